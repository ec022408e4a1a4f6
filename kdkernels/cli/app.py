"""All commands of `kdkernels`. What a command needs beyond torch is imported when it runs."""

from __future__ import annotations

import typer

from . import bench, compare_methods, data, demo, evaluate, info, inspect_model, methods, train
from .errors import EXIT_CODES, EXIT_CODES_OF_MANY

app = typer.Typer(
    name="kdkernels",
    help="Knowledge distillation for object detectors: train, distil and evaluate, on your own data or on rendered road scenes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog=EXIT_CODES_OF_MANY)(demo.demo)
app.add_typer(data.app, name="data")
app.command("train", epilog=EXIT_CODES)(train.train)
app.command("distill", epilog=EXIT_CODES)(train.distill)
app.command("methods", epilog=EXIT_CODES)(methods.methods)
app.command("compare-methods", epilog=EXIT_CODES_OF_MANY)(compare_methods.compare_methods)
app.command("evaluate", epilog=EXIT_CODES)(evaluate.evaluate)
app.command("inspect", epilog=EXIT_CODES)(inspect_model.inspect)
app.command("bench", context_settings=bench.FORWARD)(bench.bench)
app.command("info", epilog=EXIT_CODES)(info.info)
