# SPDX-License-Identifier: Apache-2.0
"""MAPL: learned low-dimensional pictures of what pipeline stages send to each other.

Pure PyTorch: nothing here knows of Megatron. Method: Janson, Oyallon, Belilovsky, "Learned
Subspace Compression for Communication-Efficient Pipeline Parallelism" (arXiv 2606.05484).
"""
