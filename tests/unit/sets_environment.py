"""A module whose main wants its environment set before the framework is imported."""

import os


def main() -> str:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    return str(torch.__version__)
