"""The same long calls for asyncio: they run in a shared pool of threads, stop when their task is cancelled, and call back on the event loop's thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from . import _jobs, models, short
from ._progress import warn

__all__ = ["AsyncArrowQuantV2", "quantize_async"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Unpack

    from ._core import DiffusionQuantConfig
    from ._settings import QuantizeSettings
    from ._types import Path
    from .results import Result

# Each job uses all processors itself; more than a few at once would only share them.
MAX_JOBS = 4

_pool = None
_pool_lock = threading.Lock()


def pool():
    """The one pool, made when it is first needed."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(MAX_JOBS, thread_name_prefix="arrow_quant_v2")
        return _pool


def forget_pool():
    """After a fork the child has none of the threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pool)


class Relay:
    """Brings calls of a worker thread to a callback on the event loop's thread, plain or async, in order; what it raises becomes a warning."""

    def __init__(self, callback):
        if not callable(callback):
            raise TypeError(f"progress_callback must be callable or None, not {type(callback).__name__}")
        self.callback, self.loop = callback, asyncio.get_running_loop()
        self.calls = asyncio.Queue()
        self.pump = self.loop.create_task(self.deliver())
        self.pump.add_done_callback(lambda pump: pump.cancelled() or pump.exception())  # taken note of, whoever waits or not

    def __call__(self, *args):
        """From the worker thread."""
        try:
            self.loop.call_soon_threadsafe(self.calls.put_nowait, args)
        except RuntimeError:  # the loop is closed: nobody listens
            pass

    async def deliver(self):
        while (args := await self.calls.get()) is not None:
            try:
                answer = self.callback(*args)
                if inspect.isawaitable(answer):
                    await answer
            except Exception as error:  # noqa: BLE001
                warn(f"progress_callback raised {error!r}; the work goes on")

    async def finish(self):
        """Waits until everything is delivered."""
        self.calls.put_nowait(None)
        await self.pump


async def run(work, relay=None):
    """Runs work(keep_going) in the pool. Cancelling the awaiting task stops it within a layer; it has stopped when CancelledError is raised.

    A result and an error alike are handed on after all that was told on the way.
    """
    stop = threading.Event()
    job = pool().submit(work, lambda: not stop.is_set())
    done = asyncio.wrap_future(job)
    try:
        await asyncio.wait([done])
        if relay is not None:
            await relay.finish()
        return done.result()
    except asyncio.CancelledError:
        stop.set()
        if not job.cancel():
            await settle(done)
        raise
    finally:
        if relay is not None and not relay.pump.done():
            relay.pump.cancel()


async def settle(future):
    """Waits for the end of a future, whatever it is; further cancellations don't shorten it (the work ends within a layer)."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # taken note of: Interrupted


def takes_two(callback):
    """True when a callback has room for (message, fraction) only."""
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 2 and not any(p.kind == p.VAR_POSITIONAL for p in parameters)


class AsyncArrowQuantV2:
    """Quantizes models from asyncio code: the event loop stays free, and cancelling a task stops its work within a layer.

    Results and errors are those of ArrowQuantV2; errors are raised where the call is awaited. Progress callbacks may be plain or async functions and run on
    the event loop's thread. Works with asyncio.gather, wait_for and create_task; all calls share one pool of threads.

    >>> import arrow_quant_v2 as aq, asyncio
    >>> result = asyncio.run(aq.AsyncArrowQuantV2().quantize_diffusion_model_async('examples/dit-fashion', 'dit-int4'))
    >>> result['bit_width']
    4
    """

    def __repr__(self):
        return "AsyncArrowQuantV2()"

    async def quantize_diffusion_model_async(
        self, model_path: Path, output_path: Path, config: DiffusionQuantConfig | None = None, progress_callback: Callable[..., Any] | None = None
    ) -> dict[str, Any]:
        """ArrowQuantV2.quantize_diffusion_model, awaited: the same arguments and result. progress_callback(message, fraction), plain or async.

        A cancelled run keeps its state: the same call continues it.

        >>> import arrow_quant_v2 as aq, asyncio
        >>> async def main():
        ...     return await asyncio.wait_for(aq.AsyncArrowQuantV2().quantize_diffusion_model_async('examples/dit-fashion', 'dit-int4'), 600)
        >>> asyncio.run(main())['modality']
        'image'
        """
        relay = None if progress_callback is None else Relay(progress_callback)
        return await run(functools.partial(quantize, model_path, output_path, config, relay), relay)

    async def quantize_multiple_models_async(
        self, models: Iterable[tuple[Path, Path, DiffusionQuantConfig | None]], progress_callback: Callable[..., Any] | None = None
    ) -> list[dict[str, Any]]:
        """Quantizes several models at once.

        models: list of (model_path, output_path, config or None); progress_callback(model_index, message, fraction), or (message, fraction) where the callable
        takes only two. Returns their results in the order given. All are finished or cancelled before the first error is raised; its note names the model.

        >>> import arrow_quant_v2 as aq, asyncio
        >>> models = [('examples/dit-fashion', 'dit-int4', None), ('examples/dit-fashion', 'dit-int8', aq.DiffusionQuantConfig(bit_width=8))]
        >>> results = asyncio.run(aq.AsyncArrowQuantV2().quantize_multiple_models_async(models))
        >>> len(results)
        2
        """
        jobs = [(model, output, config) for model, output, config in models]
        short_form = progress_callback is not None and takes_two(progress_callback)

        async def one(index, model, output, config):
            callback = progress_callback
            if callback is not None and not short_form:
                callback = functools.partial(progress_callback, index)
            try:
                return await self.quantize_diffusion_model_async(model, output, config, callback)
            except Exception as error:
                error.add_note(f"while quantizing model {index}: {model}")
                raise

        results = await asyncio.gather(*(one(i, *job) for i, job in enumerate(jobs)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def validate_quality_async(self, original_path: Path, quantized_path: Path) -> dict[str, Any]:
        """ArrowQuantV2.validate_quality, awaited: the same arguments and result.

        >>> import arrow_quant_v2 as aq, asyncio
        >>> asyncio.run(aq.AsyncArrowQuantV2().validate_quality_async('examples/dit-fashion', 'dit-int4'))['passed']
        True
        """
        return await run(lambda keep_going: models.run_validate(original_path, quantized_path, keep_going))


def quantize(model_path, output_path, config, relay, keep_going):
    output, report = models.run_quantize("diffusion", model_path, output_path, config, relay, keep_going=keep_going)
    return models.result_of(output, report)


async def quantize_async(path: Path, output: Path | None = None, **settings: Unpack[QuantizeSettings]) -> Result:
    """quantize(), awaited: the same arguments and Result. A `progress` callable runs in the worker thread. Cancelling the task stops the work.

    >>> import arrow_quant_v2 as aq, asyncio
    >>> r = asyncio.run(aq.quantize_async('examples/dit-fashion', 'dit-int2', bits=2))
    >>> r.bpw < 3
    True
    """
    return await run(lambda keep_going: short.run_quantize(path, output, settings, keep_going))


_jobs.show_keywords(quantize_async, short.RUN_KEYWORDS)
for _member in (AsyncArrowQuantV2, quantize_async):
    _member.__module__ = "arrow_quant_v2"
