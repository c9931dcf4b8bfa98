# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launches. Imported only where a kernel is to run or to be compiled."""
