"""Lets setuptools read setup.cfg; says what it cannot: where top-level packages come from."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["horovodrunner*"], exclude=["horovodrunner.compat.sparkdl*"]),
        *find_packages(where="horovodrunner/compat", include=["sparkdl*"]),
    ],
    package_dir={"sparkdl": "horovodrunner/compat/sparkdl"},
    py_modules=["petastorm"],
)
