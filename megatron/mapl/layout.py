# SPDX-License-Identifier: Apache-2.0
"""Which layers a pipeline stage holds, by Megatron's flags."""

from typing import Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


def pipeline_layout(args: Any) -> Any:
    """Megatron's `PipelineParallelLayerLayout` of --pipeline-model-parallel-layout, or None."""
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):  # Megatron parses it for the model's configuration alone
        return PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return layout
