"""Lets setuptools read setup.cfg; everything about the package is written there."""

from setuptools import setup

setup()
