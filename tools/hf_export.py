# SPDX-License-Identifier: Apache-2.0
"""The files of an export, and the losses that are measured with them."""

import shutil
from pathlib import Path
from typing import Any

import torch

from hf_boundaries import Boundaries
from hf_checkpoint import MegatronCheckpoint
from hf_config import llama_settings, save_config
from hf_errors import ConversionError
from hf_loss import Windows, mean_loss
from hf_output import save_weights
from hf_tokenizer import Tokenizer
from hf_weights import EMBEDDING, to_hugging_face

_CODE = Path(__file__).parent / "mapl_llama"
_AUTO_MAP = {
    "AutoConfig": "configuration_mapl_llama.MaplLlamaConfig",
    "AutoModelForCausalLM": "modeling_mapl_llama.MaplLlamaForCausalLM",
}


class Source:
    """What all exports of one checkpoint share.

    Raises:
        ConversionError: the checkpoint holds no model, or not that of the tokenizer.
    """

    def __init__(
        self, checkpoint: MegatronCheckpoint, boundaries: Boundaries | None, tokenizer: Tokenizer
    ) -> None:
        self.checkpoint, self.boundaries, self.tokenizer = checkpoint, boundaries, tokenizer
        if EMBEDDING not in checkpoint.tensors:
            raise ConversionError(f"--load {checkpoint.folder} has no {EMBEDDING}: it is no model")
        padded = checkpoint.shape(EMBEDDING)[0]
        if tokenizer.size > padded:
            raise ConversionError(
                f"the tokenizer has {tokenizer.size} tokens, the model's embedding {padded}; give "
                "the tokenizer that it was trained with (--tokenizer-model)"
            )

    def write(self, folder: Path, max_shard_size: str, *, exact: bool) -> None:
        """Configuration, weights, tokenizer and, if `exact`, modelling code."""
        from transformers import GenerationConfig, LlamaConfig

        from mapl_llama.configuration_mapl_llama import MaplLlamaConfig

        dtype = self.checkpoint.dtype(EMBEDDING)
        size, special = self.tokenizer.size, self.tokenizer.special_ids()
        settings = llama_settings(self.checkpoint.args, size, dtype) | special
        boundaries = self.boundaries
        if exact:
            assert boundaries is not None
            settings |= boundaries.settings()
            settings |= {"architectures": ["MaplLlamaForCausalLM"], "auto_map": _AUTO_MAP}
            config = MaplLlamaConfig(**settings)
        else:
            config = LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
        table = None if boundaries is None else boundaries.embedding_table
        weights = to_hugging_face(self.checkpoint, config, table)
        if exact:
            assert boundaries is not None
            weights |= boundaries.weights(size, dtype)
            for file in sorted(_CODE.glob("*.py")):
                shutil.copyfile(file, folder / file.name)
        save_weights(folder, weights, max_shard_size)
        save_config(config, folder)
        GenerationConfig(**special).save_pretrained(folder)
        self.tokenizer.save(folder)


def measure(
    source: Source, folder: Path, samples: Windows, max_shard_size: str, *, exact: bool
) -> dict[str, float]:
    """The losses through the boundaries and without them, as mapl_conversion.json has them.

    Args:
        source: what was exported.
        folder: the export. One without boundaries gets one with them beside it for a while.
        samples: what to measure on.
        max_shard_size: of the weights of that one.
        exact: whether the export has the boundaries.
    """
    from transformers import LlamaForCausalLM

    from mapl_llama.modeling_mapl_llama import MaplLlamaForCausalLM

    if source.boundaries is None:
        model = LlamaForCausalLM.from_pretrained(folder)
        return {"plain": mean_loss(_on_device(model), samples, "loss")}
    measured = folder
    if not exact:
        measured = folder / "exact"
        measured.mkdir()
        source.write(measured, max_shard_size, exact=True)
    try:
        model = _on_device(MaplLlamaForCausalLM.from_pretrained(measured))
        losses = {"trained": mean_loss(model, samples, "loss as trained")}
        for layer in model.model.layers:
            layer.boundary = None
        losses["plain"] = mean_loss(model, samples, "loss without boundaries")
    finally:
        if not exact:
            shutil.rmtree(measured)
    losses["change_percent"] = 100 * (losses["plain"] / losses["trained"] - 1)
    return losses


def _on_device(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model
