# SPDX-License-Identifier: Apache-2.0
"""How boundaries get to a script's model, whether a configuration or a function builds it.

Since 0.19 Megatron builds the model that `pretrain`'s configuration names, and calls the pre-wrap
hooks in that configuration with all chunks of a process, before they are cast and wrapped. Before
0.19, and still if there is no such configuration, the script's `model_provider` builds each chunk;
the hooks are then called when it has built the last one.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron.mapl.errors import exit_with_error
from megatron.mapl.runtime import MaplRuntime

Hook = Callable[[list[Any]], list[Any]]

#: Arguments of `pretrain` for pipelines of another shape: name → what is there unless it is used.
_OWN_PIPELINE = {"p2p_communicator": None, "pg_collection": None, "skip_model_parallel_init": False}


def put_hooks(
    call: dict[str, Any], hooks: Sequence[Hook], args: Any, runtime: MaplRuntime | None
) -> None:
    """Has Megatron's `pretrain` call the hooks.

    Args:
        call: its arguments by name; the provider among them is replaced.
        hooks: to be called in order, each with what the one before it returned.
        args: Megatron's namespace.
        runtime: of the boundaries, if there are any.

    Raises:
        ValueError: with boundaries, `pretrain` is to use a pipeline that the script has built.
    """
    for name, unused in _OWN_PIPELINE.items():
        if runtime is not None and call.get(name, unused) is not unused:
            raise ValueError(
                f"it gives megatron.training.pretrain a {name} of its own, with which boundaries "
                "do not work; leave that or --mapl-rank out"
            )
    config, provider = getattr(call["cfg_container"], "model", None), call.get("model_provider")
    if config is not None and not any(hook in config.pre_wrap_hooks for hook in hooks):
        config.pre_wrap_hooks += hooks
    if provider is not None:
        virtual = args.virtual_pipeline_model_parallel_size
        chunks = 1 if virtual is None or args.pipeline_model_parallel_size == 1 else virtual
        call["model_provider"] = _calling_hooks(provider, hooks, chunks)


def _calling_hooks(
    provider: Callable[..., Any], hooks: Sequence[Hook], count: int
) -> Callable[..., Any]:
    """A `model_provider` that calls the hooks with all `count` chunks of the process."""
    built: list[Any] = []

    @wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        chunk = provider(*args, **kwargs)
        if "vp_stage" in kwargs:
            chunk.vp_stage = kwargs["vp_stage"]  # as Megatron does, but afterwards
        built.append(chunk)
        if len(built) == count:
            chunks = list(built)
            built.clear()
            for hook in hooks:
                chunks = hook(chunks)
            assert chunks[-1] is chunk, "hooks change chunks in place"
        return chunk

    return provide


def check_chunks(chunks: list[Any], runtime: MaplRuntime) -> list[Any]:
    """Pre-wrap hook: ends the process unless boundaries fit to the model that was built."""
    try:
        for chunk in chunks:
            _check_chunk(chunk, runtime)
    except ValueError as error:
        exit_with_error(error)
    return chunks


def _check_chunk(chunk: Any, runtime: MaplRuntime) -> None:
    """
    Raises:
        ValueError: the script builds another model than boundaries know, or than its flags say.
    """
    if not isinstance(chunk, GPTModel):
        raise ValueError(
            f"its model is a {type(chunk).__name__}, but boundaries know Megatron's GPTModel and "
            "classes derived from it alone; leave --mapl-rank out"
        )
    built = {
        "hidden size": (chunk.config.hidden_size, runtime.plan.hidden_size),
        "vocabulary size": (chunk.vocab_size, runtime.vocab_size),
        "dtype between stages": (chunk.config.pipeline_dtype, runtime.pipeline_dtype),
        "finalize_model_grads_func": (chunk.config.finalize_model_grads_func, None),
    }
    for name, (found, due) in built.items():
        if found != due:
            raise ValueError(
                f"its model has the {name} {found}, but with the flags given boundaries need "
                f"{due}; have the script build its model by Megatron's flags, or leave --mapl-rank "
                "out"
            )
