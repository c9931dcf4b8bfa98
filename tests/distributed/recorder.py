# SPDX-License-Identifier: Apache-2.0
"""What a job's process notes for the test, at full precision."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def import_all() -> None:
    """Imports what a training job imports, and does once what each job would do again."""
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text  # with transformers
    import megatron.core.tokenizers.text.models
    import megatron.training.datasets.fim_dataset
    import megatron.training.inprocess_restart  # noqa: F401
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    from megatron.mapl import pretraining  # noqa: F401
    from megatron.mapl.arguments import add_arguments

    # Megatron parses the source of its settings for each list of flags, three times a job.
    read = ArgumentGroupFactory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def read_once(factory: Any, settings: type) -> dict[str, str]:
        if settings not in known:
            known[settings] = read(factory, settings)
        return dict(known[settings])

    ArgumentGroupFactory._get_field_docstrings = read_once
    add_arguments(add_megatron_arguments(ArgumentParser(conflict_handler="resolve")))
    # It would shuffle millions of mock samples for the few that a job takes.
    MockGPTLowLevelDataset.size = 2000


def run(path: Path, job: dict[str, Any]) -> None:
    """Runs the job with the arguments in sys.argv and saves the record at `path`."""
    import torch
    from megatron.training import training

    from megatron.mapl import pretraining

    record: dict[str, Any] = {"loss": [], "grad_norm": [], "validation": [], "projectors": {}}
    if job["tamper"]:
        import tampering

        getattr(tampering, job["tamper"])(record)
    log, evaluate = training.training_log, training.evaluate

    def noting_log(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        record["loss"] += [float(value) for key, value in loss_dict.items() if key == "lm loss"]
        record["grad_norm"].append(args[5])
        return log(loss_dict, *args, **kwargs)

    def noting_evaluate(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        if result[0]:
            record["validation"] += [float(v) for k, v in result[0].items() if k == "lm loss"]
        return result

    training.training_log, training.evaluate = noting_log, noting_evaluate

    def noting(attach: Any) -> Any:
        def noting_attach(chunks: Any, runtime: Any) -> Any:
            attach(chunks, runtime)
            record["runtime"] = runtime
            record["start"] = projectors(runtime)
            record["start_codebooks"] = codebooks(runtime)
            return chunks

        return noting_attach

    for module in (pretraining.model, pretraining.virtual_stages):
        module.attach = noting(module.attach)  # type: ignore[attr-defined]
    check_sides = pretraining.checkpoint.check_sides

    def noting_check_sides(runtime: Any) -> None:
        check_sides(runtime)
        record.setdefault("checked", []).append(projectors(runtime))
        if len(record["checked"]) == 2:  # the first is at start, the second after a load
            record["loaded_codebooks"] = codebooks(runtime)
            record["loaded_lowrank"] = lowrank(runtime)

    pretraining.checkpoint.check_sides = noting_check_sides
    try:
        if job["plain"]:
            import plain_megatron

            plain_megatron.run()
        elif job.get("script"):
            from megatron.mapl import __main__ as entry

            entry.main([job["script"], *sys.argv[1:]])
        else:
            import pretrain_gpt
            from megatron.mapl import session

            session.run(pretrain_gpt.train)
    finally:
        runtime = record.pop("runtime", None)
        if runtime is not None:
            record["projectors"] = projectors(runtime)
            record["codebooks"] = codebooks(runtime)
            record["lowrank"] = lowrank(runtime)
            record["payloads"] = {
                (port.boundary, port.is_outlet): [
                    max(channel.sent, channel.received)
                    for channel in (port.forward_channel, port.backward_channel)
                ]
                for port in runtime.ports()
            }
            record["geometry"] = {
                stage.outlet.boundary: stage.probe.measured
                for stage in runtime.stages
                if stage.probe is not None
            }
            record["anchors"] = [
                {
                    name: tensor.detach().clone()
                    for name, tensor in stage.anchor.state_dict().items()
                }
                for stage in runtime.stages
            ]
        torch.save(record, path)


def codebooks(runtime: Any) -> dict[tuple[int, str], Any]:
    """(boundary, side) → copies of the codebooks, those of activations first."""
    return {
        (port.boundary, "outlet" if port.is_outlet else "inlet"): [
            codec.codebook.clone() for codec in port.codebook_codecs()
        ]
        for port in runtime.ports()
    }


def lowrank(runtime: Any) -> dict[int, Any]:
    """Boundary → a copy of the Q that its gradients of low rank start from."""
    codecs = {port.boundary: port.sending_lowrank_codec() for port in runtime.ports()}
    return {boundary: codec.Q.clone() for boundary, codec in codecs.items() if codec is not None}


def projectors(runtime: Any) -> dict[tuple[int, str], Any]:
    """(boundary, side) → copies of A and momentum."""
    inlets = {id(port) for port in runtime.inlets()}
    return {
        (port.boundary, "inlet" if id(port) in inlets else "outlet"): {
            name: tensor.detach().clone() for name, tensor in port.projector.state_dict().items()
        }
        for port in runtime.ports()
        if port.projector is not None
    }
