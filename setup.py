# SPDX-License-Identifier: Apache-2.0
"""Which packages the distribution holds; everything else about it stands in pyproject.toml.

`megatron` is a namespace package: the wheel megatron-core brings megatron.core and
megatron.training, this project adds megatron.mapl, and neither ships megatron/__init__.py.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(
        include=["mapl", "mapl.*", "megatron.mapl", "megatron.mapl.*"],
        exclude=["*.__pycache__", "*.__pycache__.*"],
    ),
    py_modules=[],
    package_data={"mapl": ["py.typed"], "megatron.mapl": ["py.typed"]},
)
