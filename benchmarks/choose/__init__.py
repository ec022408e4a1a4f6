"""`kdkernels bench choose`: the backend that `auto` takes for each primitive, chosen by time on the GPU that is there."""
