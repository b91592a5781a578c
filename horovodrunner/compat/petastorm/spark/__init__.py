"""What Petastorm has for Spark's DataFrames. Runs in: the driver and the worker."""

from horovodrunner.compat.absent import PETASTORM, refuse_names
from horovodrunner.compat.petastorm.converter import SparkDatasetConverter, make_spark_converter

__all__ = ["SparkDatasetConverter", "make_spark_converter"]

__getattr__ = refuse_names("petastorm.spark", PETASTORM)
