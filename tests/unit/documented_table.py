# SPDX-License-Identifier: Apache-2.0
"""Which test runs each command in README and docs, or why none does."""

HERE = "run here"
SETUP = "not run: makes or removes the environment that this runs in"
#: Before the name of a test.
FLAGS_READ = "not run, its flags are read:"
SELF = "it is what runs these tests"
GPU = "not run: needs a GPU"
ROOT_USER = "not run: needs root, and half an hour"
HOURS = "not run: trains for minutes to days"
INSTALLS = "not run: downloads packages"
SHELL = "not run: it is the shell's"
CLUSTER = "not run: needs a cluster's own programs"

_LAUNCHER = "tests/distributed/test_llama_launcher.py"
_SLURM = "tests/distributed/test_llama_slurm.py::test_every_node_trains"
_HF = "tests/distributed/test_hugging_face.py"
_SCRIPTS = "tests/distributed/test_scripts.py"
_DATA = "tests/unit/test_prepare_data.py"
_SWEEP = "tests/unit/test_sweep.py"
_SWEEP_RUNS = f"{_SWEEP}::test_runs_once_and_tells_what_it_came_to"

#: Command, or its beginning before …, → what runs it or why nothing does. A test is named by its
#: file, and runs the same program with a smaller job.
TABLE = {
    "make test": SELF,
    'make test ARGS="-k checkpoint -x"': SELF,
    "make test WORKERS=4": SELF,
    "make lint types": "not run: reads the code alone; `make test` does so before these tests",
    "make test-older": "not run: installs another Megatron; by hand, and before releases",
    "make docs": "tests/unit/test_docs_site.py::site",
    "make demo": HOURS,
    "make setup": SETUP,
    "make setup MAPL_PYTHON=/path/to/python3.12": SETUP,
    "make clean": SETUP,
    "source .venv/bin/activate": SHELL,
    ". .venv/bin/activate": SHELL,
    "apt-get install chromium-headless-shell": "not run: needs root; .ci/run does it, with apt-get",
    ".venv/bin/python -m pip install -e '.[gpu]'": INSTALLS,
    "pip install -e '.[gpu]'": INSTALLS,
    "pip install --dry-run -c c.txt megatron-bridge": INSTALLS,
    # Data
    "python tools/prepare_data.py --input corpus/*.jsonl …": _DATA,
    "python tools/prepare_data.py --input english/*.jsonl.xz …": _DATA,
    "python tools/prepare_data.py --input code …": _DATA,
    "python tools/prepare_data.py --input CORPUS …": _DATA,
    "python tools/prepare_data.py --source stdlib …": f"{_DATA}::test_stdlib_source",
    # Training
    "DATA=data/corpus sbatch --nodes=4 examples/llama/slurm/bare-metal.sbatch 1b": _SLURM,
    "DATA=data/corpus sbatch --nodes=4 --account=NAME …": _SLURM,
    "DATA=data/corpus NETWORK_INTERFACE=wg0 sbatch …": (
        "tests/distributed/test_llama_slurm.py::"
        "test_the_master_listens_on_the_network_that_is_asked_for"
    ),
    "CONTAINER_IMAGE=image.sqsh DATA=data/corpus sbatch …": _SLURM,
    "DATA=data/corpus examples/llama/train.sh 150m": (
        f"{_LAUNCHER}::test_a_node_gets_a_process_for_each_gpu"
    ),
    "DATA=data/stdlib examples/llama/train.sh tiny": (
        f"{_LAUNCHER}::test_a_laptop_gets_a_process_for_each_stage"
    ),
    "NNODES=4 NODE_RANK=0 MASTER_ADDR=node-0 …": f"{_LAUNCHER}::test_one_node_of_many",
    "DATA=data/corpus NPROC_PER_NODE=4 examples/llama/train.sh …": (
        f"{_LAUNCHER}::test_processes_may_share_a_gpu"
    ),
    "SAVE=checkpoints/150m-plain DATA=data/corpus PLAIN=1 …": (
        f"{_LAUNCHER}::test_plain_megatron_is_the_recipe_without_boundaries"
    ),
    "SAVE=checkpoints/150m-paper DATA=data/corpus examples/llama/train.sh 150m …": (
        f"{FLAGS_READ} tests/cpu_mode/test_recipe_flags.py::test_the_papers_setting_of_its_sizes"
    ),
    "NPROC_PER_NODE=2 DATA=data/stdlib examples/llama/train.sh tiny …": (
        f"{_LAUNCHER}::test_processes_may_share_a_gpu"
    ),
    "train.sh --help": HERE,
    "torchrun --nproc-per-node 4 pretrain_gpt.py --pipeline-model-parallel-size 4 …": (
        "tests/distributed/test_torchrun.py::test_torchrun_starts_the_same_job"
    ),
    "torchrun --standalone --nproc-per-node 4 pretrain_gpt.py …": (
        "tests/distributed/test_traffic.py::test_an_emulated_network_changes_no_loss"
    ),
    "torchrun --nproc-per-node 8 -m megatron.mapl pretrain_gpt.py …": (
        f"{_SCRIPTS}::test_torchrun_starts_the_same_job"
    ),
    "python -m megatron.mapl SCRIPT ARGS…": (
        f"{_SCRIPTS}::test_python_starts_a_script_of_a_checkout"
    ),
    "python -m megatron.mapl": "tests/unit/test_entry.py::test_without_a_script",
    "python SCRIPT": f"{_SCRIPTS}::test_without_the_flag_it_is_plain_megatron",
    "python pretrain_gpt.py … --mapl-rank 256 … --mapl-report-dir out/learned": (
        "tests/distributed/test_virtual_stages.py::test_equals_the_pipeline"
    ),
    "python pretrain_gpt.py … --mapl-rank 256 … --mapl-projector fixed": (
        "tests/distributed/test_virtual_stages.py::test_equals_the_pipeline"
    ),
    'python tools/demo.py --mapl-flags …FLAGS --eval-iters 16 --seed SEED"': HOURS,
    'python tools/demo.py --mapl-flags … --mapl-flags "--mapl-rank 66 ANCHORS"': HOURS,
    # Results
    "python tools/sweep.py tools/sweeps/headline.toml … --data data/english": _SWEEP_RUNS,
    "python tools/sweep.py tools/sweeps/headline.toml … --data data/source": _SWEEP_RUNS,
    "python tools/sweep.py tools/sweeps/anchors.toml … --data data/source": _SWEEP_RUNS,
    "python tools/sweep.py tools/sweeps/adam.toml … --data data/source": _SWEEP_RUNS,
    "python tools/sweep.py tools/sweeps/short.toml … --data data/english": _SWEEP_RUNS,
    "python tools/sweep.py tools/sweeps/… --report-only": (
        "tests/unit/test_docs_results.py::test_tables_are_made_again_from_what_is_kept"
    ),
    "python tools/report.py docs/results/geometry/learned/report …": (
        "tests/unit/test_docs_results.py::test_the_picture_of_the_geometry_is_made_again"
    ),
    "python tools/sweep.py tools/sweeps/headline.toml … --workers 8 --seconds 3300": (
        f"{_SWEEP}::test_seconds_stop_and_the_next_call_goes_on"
    ),
    "python tools/sweep.py tools/sweeps/search.toml …": (
        "tests/distributed/test_sweep_megatron.py::test_a_stopped_sweep_comes_to_the_same"
    ),
    "python tools/report.py out/learned out/fixed …": (
        "tests/unit/test_report_geometry.py::test_command_line_draws_both"
    ),
    "python tools/report.py runs/plain runs/mine …": (
        "tests/unit/test_report.py::test_command_line_writes_a_page"
    ),
    "python pretrain_gpt.py … --tensorboard-dir out/plain": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    "python pretrain_gpt.py … --tensorboard-dir out/mapl": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    "python tools/report.py out/plain out/mapl …": (
        "tests/distributed/test_report_browser.py::page_file"
    ),
    # Conversion
    "python tools/convert_to_hf.py --load runs/mine --output mine-hf": f"{_HF}::exact",
    "python tools/convert_to_hf.py --load checkpoints/mine …": f"{_HF}::exact",
    "python tools/convert_to_hf.py --load runs/mine --output mine-plain …": f"{_HF}::plain",
    "python tools/convert_from_hf.py …": f"{_HF}::test_round_trips",
    "python -m pytest -n0 -rP --show-capture=stdout tests/distributed/test_hugging_face.py": SELF,
    # Planning
    "python tools/traffic_budget.py --hidden-size 4096 --rank 1280 …": HERE,
    "python tools/traffic_budget.py --hidden-size 4096 --rank 512 …": HERE,
    "python tools/traffic_budget.py --hidden-size 2048 …": HERE,
    "python tools/plan.py …": (
        "tests/unit/test_plan.py::test_the_docs_have_what_the_command_prints"
    ),
    "python tools/check_plan.py docs/planning-bench.json": (
        "tests/unit/test_check_plan.py::test_the_docs_state_the_errors_of_the_bench"
    ),
    "torchrun --nnodes 4 … tools/measure_links.py …": (
        "tests/distributed/test_measure_links.py::test_all_pairs_under_torchrun"
    ),
    # Benches
    "sudo .venv/bin/python tools/bench_slow_network.py": ROOT_USER,
    "sudo .venv/bin/python tools/bench_slow_network.py [--quick]": ROOT_USER,
    "sudo .venv/bin/python tools/bench_slow_network.py --quick …": ROOT_USER,
    "python tools/bench_emulated_link.py --rounds 9": "not run: measures times, for minutes",
    "python tools/bench_pipeline.py --layout gloo-pp4": GPU,
    "python tools/bench_pipeline.py --layout nccl-pp2-vpp2": GPU,
    "python tools/bench_pipeline.py --layout single": GPU,
    "python tools/bench_pipeline.py --layout gloo-pp4 --settings …": GPU,
    "python tools/bench_pipeline.py --layout gloo-pp4 --rounds 1 --steps 10": GPU,
    "python tools/bench_ops.py": GPU,
    "python tools/bench_ops.py --quick": GPU,
    "python tools/bench_ops.py --json ops.json": GPU,
    "python tools/bench_ops_plot.py …": "not run: draws what bench_ops.py measures on a GPU",
    "python tools/bench_host.py": GPU,
    "python tools/compile_ops.py": (
        "tests/unit/test_ops_compile.py::test_kernels_compile_for_hopper"
    ),
    ".venv/bin/python -m pytest tests/gpu": GPU,
    "python -m pytest tests/gpu": GPU,
    "python -m pytest tests/gpu/test_staging_cuda.py …": GPU,
    "python -m pytest tests/gpu/test_nccl.py": GPU,
    "python -m pytest tests/gpu/test_cuda.py …": GPU,
    "compute-sanitizer --tool memcheck": GPU,
    # Named in the text
    "apptainer exec --nv": CLUSTER,
    "srun --container-image": CLUSTER,
    "scancel --signal=USR1": CLUSTER,
    "scontrol requeue": CLUSTER,
    "ip -br addr": CLUSTER,
}
