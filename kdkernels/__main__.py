"""`python -m kdkernels`, which `torchrun -m kdkernels distill ...` needs."""

from kdkernels.cli import main

if __name__ == "__main__":
    main()
