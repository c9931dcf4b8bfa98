# SPDX-License-Identifier: Apache-2.0
"""MAPL for Megatron-LM: learned subspace compression of pipeline boundaries."""
