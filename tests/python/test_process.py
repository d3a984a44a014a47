"""The module inside a process: Ctrl-C, fork, worker processes, sub-interpreters, time to import."""

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import arrow_quant_v2 as aq
import numpy as np
import pytest
from files import tree_bytes, write_model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small") / "m")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB: seconds of work."""
    return write_model(tmp_path_factory.mktemp("large") / "m", n_layers=50, rows=1024, cols=1024)


def run_python(code, *args, timeout=120):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=timeout, check=False)


# ---- Ctrl-C ----

INTERRUPTED = """
import sys, arrow_quant_v2 as aq
def told(message, fraction):
    if fraction > 0:
        print("working", flush=True)
call, model, out = sys.argv[1:]
try:
    if call == "method":
        aq.ArrowQuantV2().quantize_diffusion_model(model, out, None, told)
    elif call == "async":
        import asyncio
        asyncio.run(aq.AsyncArrowQuantV2().quantize_diffusion_model_async(model, out, None, told))
    else:
        aq.quantize(model, out, progress=lambda p: told("", p.fraction))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("call", ["method", "short", "async"])
def test_FA10_ctrl_c_stops_a_long_call_and_leaves_nothing_half_written(large, tmp_path, call):
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, call, str(large), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    while (line := process.stdout.readline().strip()) not in ("working", ""):
        pass
    assert line == "working"
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0 and rest[-1] == "interrupted"
    assert not (tmp_path / "out").exists()
    aq.quantize(large, tmp_path / "out")
    aq.quantize(large, tmp_path / "whole")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole") and sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


OTHERS_INTERRUPTED = """
import os, signal, sys, threading, arrow_quant_v2 as aq
name, model, container, out = sys.argv[1:]
def told(p):
    if p.fraction > 0:
        os.kill(os.getpid(), signal.SIGINT)
def generation(figures):
    os.kill(os.getpid(), signal.SIGINT)
calls = {
    "verify": lambda: aq.verify(container, model, progress=told),
    "diff": lambda: aq.diff(container, model, progress=told),
    "export": lambda: aq.export(container, out, progress=told),
    "export gguf": lambda: aq.export(container, out + ".gguf", to="gguf", progress=told),
    "export gptq": lambda: aq.export(container, out, to="gptq", source=model, progress=told),
    "report": lambda: aq.report(container, out, against=model, progress=told),
    "plan": lambda: aq.plan(model, target_bpw=5, progress=told),
    "evolve": lambda: aq.plan(model, target_bpw=5, generations=1000, on_generation=generation),
    "evolve with a fitness": lambda: aq.plan(model, target_bpw=5, generations=1000, fitness=lambda layers: generation(layers) or 1.0),
    "search": lambda: aq.EvolutionarySearch(num_generations=100000, max_evaluations=10**9).search(model, out, aq.DiffusionQuantConfig(modality="image")),
}
if name == "search":
    threading.Timer(0.5, generation, [None]).start()
try:
    calls[name]()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture(scope="module")
def container(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("container") / "c"
    aq.quantize(large, out, method="rtn", verify=False)
    return out


@pytest.mark.parametrize("call", ["verify", "diff", "export", "export gguf", "export gptq", "report", "plan", "evolve", "evolve with a fitness", "search"])
def test_FA10_ctrl_c_stops_every_other_long_call_and_nothing_half_written_stays(large, container, tmp_path, call):
    run = run_python(OTHERS_INTERRUPTED, call, large, container, tmp_path / "out")
    assert run.stdout == "interrupted\n", run.stderr
    assert not list(tmp_path.iterdir())


def test_FA10_ctrl_c_stops_inside_one_large_layer(tmp_path):
    model = write_model(tmp_path / "m", n_layers=1, rows=8192, cols=4096)
    code = """
import os, signal, sys, threading, time, arrow_quant_v2 as aq
def told(p):
    if p.stage == "quantize" and p.n_done == 0 and p.fraction > 0:
        os.kill(os.getpid(), signal.SIGINT)
try:
    aq.quantize(sys.argv[1], sys.argv[2], progress=told, threads=1)
except KeyboardInterrupt:
    print("interrupted")
"""
    run = run_python(code, model, tmp_path / "out")
    assert run.stdout == "interrupted\n", run.stderr
    assert not (tmp_path / "out").exists()


# ---- fork and worker processes ----


def work(args):
    model, out = args
    r = aq.quantize(model, out)
    v = aq.ArrowQuantV2().quantize_batch({"w": np.ones((64, 64), np.float32)})
    return r.cosine, v["w"]["bit_width"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_FA17_worker_processes_give_the_same(small, tmp_path, method):
    expected = work((small, tmp_path / "parent"))
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(work, [(small, tmp_path / f"{method}{i}") for i in range(4)])
    assert results == [expected] * 4
    assert all(tree_bytes(tmp_path / f"{method}{i}") == tree_bytes(tmp_path / "parent") for i in range(4))


def test_FA17_quantizers_and_errors_go_from_process_to_process(small, tmp_path):
    q = aq.ArrowQuantV2("base")
    weights = [{"w": np.full((2, 3), i, np.float32)} for i in range(3)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(q.quantize_batch, weights) == [q.quantize_batch(w) for w in weights]
        with pytest.raises(aq.ModelNotFoundError, match="^Model not found: nowhere$") as e:
            pool.apply(aq.quantize, ("nowhere",))
        with pytest.raises(aq.BudgetError) as budget:
            pool.apply(aq.plan, (small,), {"target_size": "1B"})
    assert (e.value.file, e.value.code) == ("nowhere", 6) and budget.value.minimum > 1 and budget.value.hint
    timed = aq.ArrowQuantV2()
    timed._markov = '{"is_valid": true}'
    for other in (pickle.loads(pickle.dumps(timed)), copy.copy(timed), copy.deepcopy(timed)):
        assert other.mode == "diffusion" and other.get_markov_metrics() == {"is_valid": True}


def test_FA17_workers_of_a_torch_data_loader_read_a_container(small, tmp_path):
    data = pytest.importorskip("torch.utils.data")
    aq.quantize(small, tmp_path / "out")
    with aq.open(tmp_path / "out") as reader:  # opened before the fork, read after it

        class Layers(data.Dataset):
            def __len__(self):
                return len(reader)

            def __getitem__(self, i):
                return reader[list(reader)[i]].dequantize()

        batches = list(data.DataLoader(Layers(), batch_size=1, num_workers=2, multiprocessing_context="fork"))
        assert len(batches) == 3 and all(np.array_equal(b[0].numpy(), t.dequantize()) for b, t in zip(batches, reader.values(), strict=True))


def test_FA17_a_child_of_os_fork_works_after_the_pool_was_used(small, tmp_path):
    code = """
import asyncio, os, sys, arrow_quant_v2 as aq
model, folder = sys.argv[1:]
asyncio.run(aq.quantize_async(model, folder + "/before"))
child = os.fork()
if child == 0:
    asyncio.run(aq.quantize_async(model, folder + "/child"))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = run_python(code, small, tmp_path)
    assert run.stdout == "0\n", run.stderr
    assert tree_bytes(tmp_path / "child") == tree_bytes(tmp_path / "before")


def test_FA17_a_fork_in_the_middle_of_a_run_disturbs_neither(small, tmp_path):
    def fork(progress):
        if progress.stage == "quantize" and not children:
            child = os.fork()
            if child == 0:
                os._exit(7)
            children.append(child)

    children = []
    aq.quantize(small, tmp_path / "out", progress=fork)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
    assert aq.verify(tmp_path / "out", small)["ok"]


# ---- sub-interpreters ----

SUBINTERPRETER = """
import sys
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
import arrow_quant_v2 as aq
text = '''
import arrow_quant_v2 as aq
r = aq.quantize({0!r}, {1!r})
assert r.cosine > 0.9 and aq.quantize_array([[0.0, 1.0], [2.0, 3.0]], as_numpy=False)["bit_width"] == 4
try:
    aq.quantize("nowhere", "x")
except aq.ModelNotFoundError as error:
    assert "Model not found: nowhere" in str(error)
else:
    raise AssertionError
'''
for i in range(3):
    one = interpreters.create()
    failed = interpreters.run_string(one, text.format(sys.argv[1], sys.argv[2] + str(i)))
    assert failed is None, failed
    interpreters.destroy(one)
print(aq.quantize(sys.argv[1], sys.argv[2]).cosine > 0.9)
"""


def test_FA17_sub_interpreters_have_their_own_module(small, tmp_path):
    run = run_python(SUBINTERPRETER, small, tmp_path / "out")
    assert run.stdout == "True\n", run.stderr
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "out0") == tree_bytes(tmp_path / "out2")


# ---- import ----


def test_importing_loads_nothing_it_does_not_need():
    code = "import sys, arrow_quant_v2; print(sorted({'numpy', 'pyarrow', 'torch', 'asyncio', 'dataclasses', 'json', 'logging'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"], capture_output=True, text=True, check=False)
    assert run.stdout == "[]\n", run.stderr + run.stdout


def test_everything_is_found_and_nothing_else():
    assert set(aq.__all__) <= set(dir(aq))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        aq.quantise  # noqa: B018


WARNED = """
import sys, arrow_quant_v2 as aq
r = aq.quantize(sys.argv[1], sys.argv[2])
print(len(r.warnings))
if len(sys.argv) > 3:
    import logging
    logging.basicConfig(format="%(name)s %(levelname)s")
    aq.quantize(sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_nothing_is_printed_unless_logging_is_set_up(tmp_path):
    source = write_model(tmp_path / "m", n_layers=1, rows=8, cols=8) / "model.safetensors"
    run = run_python(WARNED, source, tmp_path / "out")
    assert run.returncode == 0 and int(run.stdout) > 0 and run.stderr == "", run.stderr
    run = run_python(WARNED, source, tmp_path / "heard", "listen")
    assert "arrow_quant_v2 WARNING" in run.stderr
