"""AsyncArrowQuantV2 and quantize_async: the loop stays free, cancelling stops the work, callbacks run on the loop's thread."""

import asyncio
import gc
import threading
import time

import arrow_quant_v2 as aq
import pytest
from files import SAMPLE, tree_bytes, write_model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small") / "m")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose run takes long enough to be cancelled in the middle."""
    return write_model(tmp_path_factory.mktemp("large") / "m", n_layers=40, rows=1024, cols=1024)


@pytest.fixture
def quantizer():
    return aq.AsyncArrowQuantV2()


def partial_folders(folder):
    return [p.name for p in folder.iterdir() if ".partial-" in p.name]


def test_results_are_those_of_the_plain_calls(quantizer, small, tmp_path):
    plain = aq.ArrowQuantV2().quantize_diffusion_model(small, tmp_path / "plain")
    result = asyncio.run(quantizer.quantize_diffusion_model_async(small, tmp_path / "async"))
    assert result.keys() == plain.keys() and result["per_layer"] == plain["per_layer"]
    assert tree_bytes(tmp_path / "async") == tree_bytes(tmp_path / "plain")
    check = asyncio.run(quantizer.validate_quality_async(small, tmp_path / "async"))
    assert check == aq.ArrowQuantV2().validate_quality(small, tmp_path / "async")


def test_the_event_loop_stays_responsive(quantizer, large, tmp_path):
    """A coroutine that only yields goes round many times in most of the gaps between calls of the progress callback, from the first to the last: nowhere does
    the work hold the loop's thread or the GIL. (Only most: two calls come at once where the system gave the loop no time in between.)"""

    async def main():
        ticks, seen, done = 0, [], False

        async def ticker():
            nonlocal ticks
            while not done:
                ticks += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(ticker())
        await quantizer.quantize_diffusion_model_async(large, tmp_path / "out", None, lambda message, fraction: seen.append(ticks))
        done = True
        await task
        return seen

    seen = asyncio.run(main())
    gaps = sorted(b - a for a, b in zip(seen[:-1], seen[1:], strict=True))
    assert len(seen) >= 3 and gaps[len(gaps) // 3] >= 100 and seen[-1] >= 1000


def test_the_loops_thread_has_no_part_in_the_work(quantizer, large, tmp_path):
    """Time is the processor's, each thread's own: it does not pass while others run."""

    async def main():
        whole, own = time.process_time(), time.thread_time()
        await quantizer.quantize_diffusion_model_async(large, tmp_path / "out", None, lambda message, fraction: None)
        await quantizer.validate_quality_async(large, tmp_path / "out")
        await aq.quantize_async(large, tmp_path / "short", method="rtn")
        return time.process_time() - whole, time.thread_time() - own

    whole, own = asyncio.run(main())
    assert whole > 0.1 and own < whole / 10


def test_callbacks_plain_and_async_run_on_the_loops_thread_in_order(quantizer, small, tmp_path):
    calls = []

    def plain(message, fraction):
        calls.append((message, fraction, threading.current_thread()))

    async def slow(message, fraction):
        await asyncio.sleep(0.001)
        calls.append((message, fraction, threading.current_thread()))

    for i, callback in enumerate((plain, slow)):
        calls.clear()
        asyncio.run(quantizer.quantize_diffusion_model_async(small, tmp_path / str(i), None, callback))
        assert calls[0][:2] == ("Starting quantization...", 0.0) and calls[-1][:2] == ("Quantization complete", 1.0)
        fractions = [fraction for _, fraction, _ in calls]
        assert fractions == sorted(fractions) and {thread for *_, thread in calls} == {threading.main_thread()}


def test_a_callback_that_raises_is_a_warning(quantizer, small, tmp_path):
    async def bad(message, fraction):
        raise ValueError("no thanks")

    with pytest.warns(RuntimeWarning, match="no thanks"):
        result = asyncio.run(quantizer.quantize_diffusion_model_async(small, tmp_path / "out", None, bad))
    assert result["bit_width"] == 4


def test_errors_are_raised_at_await_and_not_before(quantizer, small, tmp_path):
    calls = [
        (aq.ModelNotFoundError, (tmp_path / "nowhere", tmp_path / "out")),
        (aq.ConfigurationError, (small, tmp_path / "out", aq.DiffusionQuantConfig(bit_width=3))),
        (TypeError, (small, tmp_path / "out", {"bit_width": 4})),
        (TypeError, (small, tmp_path / "out", None, "no callable")),
    ]

    async def main():
        for error, args in calls:
            coroutine = quantizer.quantize_diffusion_model_async(*args)
            with pytest.raises(error):
                await coroutine
        with pytest.raises(aq.ModelNotFoundError):
            await quantizer.validate_quality_async(small, tmp_path / "nowhere")

    asyncio.run(main())
    assert not (tmp_path / "out").exists()


def test_cancelling_stops_the_work_and_the_same_call_continues(quantizer, large, tmp_path):
    async def main():
        begun = asyncio.Event()
        task = asyncio.create_task(
            quantizer.quantize_diffusion_model_async(large, tmp_path / "out", None, lambda message, fraction: fraction > 0 and begun.set())
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The work has stopped when the cancellation is over: nothing of it changes any more.
        before = tree_bytes(tmp_path)
        await asyncio.sleep(0.3)
        assert tree_bytes(tmp_path) == before and not (tmp_path / "out").exists() and len(partial_folders(tmp_path)) <= 1
        await quantizer.quantize_diffusion_model_async(large, tmp_path / "out")

    asyncio.run(main())
    assert partial_folders(tmp_path) == []
    aq.ArrowQuantV2().quantize_diffusion_model(large, tmp_path / "whole")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_wait_for_cancels(quantizer, large, tmp_path):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(quantizer.quantize_diffusion_model_async(large, tmp_path / "out"), 0.05)

    asyncio.run(main())
    assert not (tmp_path / "out").exists()


def test_validation_can_be_cancelled(quantizer, large, tmp_path):
    aq.ArrowQuantV2().quantize_diffusion_model(large, tmp_path / "out")

    async def main():
        task = asyncio.create_task(quantizer.validate_quality_async(large, tmp_path / "out"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_several_models_give_results_in_order_and_call_back_with_their_index(quantizer, small, tmp_path):
    models = [(small, tmp_path / str(bits), aq.DiffusionQuantConfig(bit_width=bits, min_accuracy=0.1)) for bits in (8, 2, 4)]
    calls = []
    results = asyncio.run(quantizer.quantize_multiple_models_async(models, lambda index, message, fraction: calls.append((index, message, fraction))))
    assert [r["bit_width"] for r in results] == [8, 2, 4]
    for index in range(3):
        own = [(message, fraction) for i, message, fraction in calls if i == index]
        assert own[0] == ("Starting quantization...", 0.0) and own[-1] == ("Quantization complete", 1.0)


def test_a_callback_of_two_parameters_gets_two(quantizer, small, tmp_path):
    calls = []

    async def callback(message, fraction):
        calls.append((message, fraction))

    asyncio.run(quantizer.quantize_multiple_models_async([(small, tmp_path / "a", None), (small, tmp_path / "b", None)], callback))
    assert calls.count(("Quantization complete", 1.0)) == 2


def test_the_first_error_comes_when_all_are_finished_and_names_its_model(quantizer, small, tmp_path):
    models = [(small, tmp_path / "a", None), (tmp_path / "nowhere", tmp_path / "b", None), (small, tmp_path / "c", None)]
    with pytest.raises(aq.ModelNotFoundError) as e:
        asyncio.run(quantizer.quantize_multiple_models_async(models))
    assert e.value.__notes__ == [f"while quantizing model 1: {tmp_path / 'nowhere'}"]
    assert (tmp_path / "a" / "metadata.json").exists() and (tmp_path / "c" / "metadata.json").exists() and partial_folders(tmp_path) == []


def test_cancelling_several_models_stops_them_all(quantizer, large, tmp_path):
    async def main():
        begun = asyncio.Event()
        models = [(large, tmp_path / str(i), None) for i in range(6)]
        task = asyncio.create_task(quantizer.quantize_multiple_models_async(models, lambda i, message, fraction: fraction > 0 and begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not any((tmp_path / str(i)).exists() for i in range(6))


def test_many_at_once_share_one_pool(quantizer, small, tmp_path):
    async def main():
        before = threading.active_count()
        await asyncio.gather(*(quantizer.quantize_diffusion_model_async(small, tmp_path / str(i)) for i in range(12)))
        return threading.active_count() - before

    assert asyncio.run(main()) <= 4
    trees = [tree_bytes(tmp_path / str(i)) for i in range(12)]
    assert all(tree == trees[0] for tree in trees)


def test_quantize_async_gives_a_result_and_can_be_cancelled(small, large, tmp_path):
    async def main():
        with pytest.raises(TypeError, match="did you mean 'bits'"):
            await aq.quantize_async(small, tmp_path / "x", bitz=4)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(aq.quantize_async(large, tmp_path / "large"), 0.05)
        return await aq.quantize_async(small, tmp_path / "small", bits=8)

    result = asyncio.run(main())
    assert isinstance(result, aq.Result) and {layer.bits for layer in result.layers.values()} == {8} and not (tmp_path / "large").exists()


def test_the_sample_model_under_uncooperative_tasks(quantizer, tmp_path):
    """A task that blocks the loop now and then delays callbacks, not the work."""

    async def main():
        work = asyncio.create_task(quantizer.quantize_diffusion_model_async(SAMPLE, tmp_path / "out", None, lambda m, f: None))
        while not work.done():
            time.sleep(0.05)
            await asyncio.sleep(0)
        return await work

    assert asyncio.run(main())["modality"] == "image"


def slow_teller(seen):
    async def told(message, fraction):
        await asyncio.sleep(0.05)
        seen.append(message)

    return told


def test_a_failing_job_first_delivers_what_it_told(quantizer, tmp_path):
    seen, complaints = [], []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        with pytest.raises(aq.ModelNotFoundError):
            await quantizer.quantize_diffusion_model_async(tmp_path / "nope", tmp_path / "out", None, slow_teller(seen))
        gc.collect()

    asyncio.run(main())
    assert seen == ["Starting quantization..."] and complaints == []


def test_warnings_of_callbacks_point_into_the_callers_file(quantizer, small, tmp_path):
    def told(message, fraction):
        raise ValueError("no")

    with pytest.warns(RuntimeWarning, match="progress_callback raised") as plain:
        aq.ArrowQuantV2().quantize_diffusion_model(small, tmp_path / "a", None, told)
        aq.quantize_diffusion_model(small, tmp_path / "b", None, told)
    with pytest.warns(RuntimeWarning, match="progress_callback raised") as awaited:
        asyncio.run(quantizer.quantize_diffusion_model_async(small, tmp_path / "c", None, told))
    assert {w.filename for w in [*plain, *awaited]} == {__file__}
