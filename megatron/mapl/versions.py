# SPDX-License-Identifier: Apache-2.0
"""Which Megatron MAPL works with, checked before anything is done with it.

What counts is the Megatron that is imported, which may be a checkout of its repository beside the
script, not the package that pip knows.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

#: Names by module; a dotted name is one of a class.
Symbols = Mapping[str, tuple[str, ...]]

#: Releases of megatron-core. The tests run on 0.18.2 and 0.19.2 (docs/scripts.md).
TESTED = SpecifierSet(">=0.18.2,<0.20")

#: What MAPL replaces in Megatron, derives from or calls, by module: without one of these it would
#: fail in the middle, or do nothing.
SYMBOLS: Symbols = {
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.core.dist_checkpointing": ("ShardedTensor", "load_tensors_metadata"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ("get_write_results_queue",),
    "megatron.core.distributed": ("finalize_model_grads",),
    "megatron.core.extensions.transformer_engine": ("HAVE_TE",),
    "megatron.core.models.backends": ("LocalSpecProvider.core_attention",),
    "megatron.core.models.gpt": ("GPTModel",),
    "megatron.core.num_microbatches_calculator": ("get_current_global_batch_size",),
    "megatron.core.optimizer.distrib_optimizer": (
        "HAVE_APEX_OR_TE",
        "DistributedOptimizer.state_dict",
        "DistributedOptimizer.load_state_dict",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ),
    "megatron.core.optimizer.optimizer": (
        "MegatronOptimizer.zero_grad",
        "MegatronOptimizer.prepare_grads",
        "MegatronOptimizer.step_with_ready_grads",
        "MegatronOptimizer.get_loss_scale",
        "MegatronOptimizer.param_groups",
        "Float16OptimizerWithFloat16Params.sharded_state_dict",
        "Float16OptimizerWithFloat16Params.load_state_dict",
    ),
    "megatron.core.optimizer.optimizer_config": ("ParamKey",),
    "megatron.core.parallel_state": (
        "get_data_parallel_group",
        "get_pipeline_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
    ),
    "megatron.core.pipeline_parallel.p2p_communication": (
        "P2PCommunicator._communicate",
        "_batched_p2p_ops",
        "_p2p_ops",
    ),
    "megatron.core.pipeline_parallel.schedules": (
        "P2PCommunicator",
        "forward_backward_pipelining_without_interleaving",
    ),
    "megatron.core.tensor_parallel": ("get_cuda_rng_tracker",),
    "megatron.core.tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "megatron.core.transformer.dot_product_attention": ("DotProductAttention",),
    "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType"),
    "megatron.core.transformer.moe.moe_utils": ("maybe_move_tensor_to_cpu",),
    "megatron.core.transformer.moe.token_dispatcher": ("maybe_move_tensor_to_cpu",),
    "megatron.core.transformer.pipeline_parallel_layer_layout": ("PipelineParallelLayerLayout",),
    "megatron.core.transformer.torch_norm": ("WrappedTorchNorm.__new__",),
    "megatron.core.transformer.transformer_layer": ("get_transformer_layer_offset",),
    "megatron.core.utils": ("get_pg_rank",),
    "megatron.training": (
        "get_args",
        "get_tensorboard_writer",
        "get_wandb_writer",
        "initialize_megatron",
        "pretrain",
        "print_rank_0",
        "print_rank_last",
    ),
    "megatron.training.argument_utils": (
        "ArgumentGroupFactory._build_argparse_kwargs_from_field",
        "ArgumentGroupFactory.build_group",
    ),
    "megatron.training.arguments": (
        "add_megatron_arguments",
        "parse_and_validate_args",
        "parse_args",
    ),
    "megatron.training.checkpointing": (
        "CheckpointType.GLOBAL",
        "_load_base_checkpoint",
        "checkpoint_exists",
        "load_args_from_checkpoint",
    ),
    "megatron.training.initialize": ("initialize_megatron",),
    "megatron.training.training": (
        "finalize_model_grads",
        "get_megatron_optimizer",
        "initialize_megatron",
        "load_checkpoint",
        "pretrain",
        "save_checkpoint",
        "set_jit_fusion_options",
        "train",
        "training_log",
    ),
    "megatron.training.vocab_utils": ("calculate_padded_vocab_size",),
}

#: What `pretrain_gpt.py` asks of Megatron beside that; scripts of other people need none of it.
SYMBOLS_OF_OWN_SCRIPT: Symbols = {
    "megatron.core.datasets.blended_megatron_dataset_builder": ("BlendedMegatronDatasetBuilder",),
    "megatron.core.datasets.gpt_dataset": ("GPTDataset", "GPTDatasetConfig", "MockGPTDataset"),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.rerun_state_machine": ("get_rerun_state_machine",),
    "megatron.core.transformer.multi_token_prediction": ("get_mtp_ranks", "mtp_on_this_rank"),
    "megatron.core.utils": (
        "get_attr_wrapped_model",
        "get_batch_on_this_cp_rank",
        "get_batch_on_this_tp_rank",
    ),
    "megatron.training": ("get_timers", "get_tokenizer", "set_startup_timestamps"),
    "megatron.training.argument_utils": (
        "core_transformer_config_from_args",
        "gpt_config_from_args",
        "pretrain_cfg_container_from_args",
    ),
    "megatron.training.datasets.fim_dataset": ("GPTFIMDataset", "GPTFIMDatasetConfig"),
    "megatron.training.inprocess_restart": ("maybe_wrap_for_inprocess_restart",),
    "megatron.training.utils": ("get_blend_and_blend_per_split", "is_first_or_last_pipeline_stage"),
}


class UnsupportedMegatronError(RuntimeError):
    """This Megatron is none that MAPL works with; the message says what is wrong and what helps."""


def installed() -> str:
    """The version of the Megatron that is imported here, without the commit of a checkout."""
    return Version(importlib.import_module("megatron.core.package_info").__version__).public


def check(symbols: Symbols = SYMBOLS, *, user: str = "MAPL") -> None:
    """Refuses a Megatron that MAPL would not work with; to be called before any of it is replaced.

    Args:
        symbols: what has to be there, by module.
        user: who needs it.

    Raises:
        UnsupportedMegatronError: it is missing, outside of the tested range, or something of it has
            moved; all that has moved is named.
    """
    try:
        core = importlib.import_module("megatron.core")
        version = installed()
    except ModuleNotFoundError as error:
        raise UnsupportedMegatronError(
            f"there is no Megatron to import ({error}); install megatron-core 0.19.2, or run a "
            "script that stands in a checkout of Megatron-LM"
        ) from error
    moved = list(_missing(symbols))
    tested = TESTED.contains(version, prereleases=True)
    if tested and not moved:
        return
    problems = []
    if not tested:
        problems.append(f"is outside of the tested range {TESTED}")
    if moved:
        problems.append(f"does not have {', '.join(moved)}, which {user} needs")
    raise UnsupportedMegatronError(
        f"Megatron {version} in {Path(str(core.__file__)).parent.parent} {' and '.join(problems)}; "
        "use an unchanged release of that range, best megatron-core 0.19.2"
    )


def _missing(symbols: Symbols) -> Iterator[str]:
    for module_name, names in symbols.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            # Not there itself, or in no package that is; else what it imports failed.
            gone = isinstance(error, ModuleNotFoundError) and error.name is not None
            gone = gone and f"{module_name}.".startswith(f"{error.name}.")
            yield module_name if gone else f"{module_name} ({error})"
            continue
        for name in names:
            owner: object = module
            for part in name.split("."):
                if not hasattr(owner, part):
                    yield f"{module_name}.{name}"
                    break
                owner = getattr(owner, part)
