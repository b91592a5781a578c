"""A module whose main travels by reference."""


def main() -> str:
    import torch

    return str(torch.__version__)
