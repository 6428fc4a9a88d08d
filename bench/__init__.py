"""Measurements of streaming and training, beside the alternatives. PARTS: the modules that measure
(`bench.harness`), by the names of their commands."""

PARTS = {
    "kernels": "bench.ops.kernels",
    "cpu": "bench.ops.cpu",
    "stream": "bench.stream",
    "decode": "bench.decode",
    "extrapolate": "experiments.rolling",
    "serve": "bench.serve",
    "train": "bench.train",
}
