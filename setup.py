"""Lets setuptools read setup.cfg; says what it cannot: where the two packages come from."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["horovodrunner*"], exclude=["horovodrunner.compat*"]),
        *find_packages(where="horovodrunner/compat"),
    ],
    package_dir={"sparkdl": "horovodrunner/compat/sparkdl"},
)
