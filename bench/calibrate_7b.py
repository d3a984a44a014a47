"""Second moments of a model of 7 billion parameters, collected in 8 GB of memory.

Usage: python bench/calibrate_7b.py [--limit GB] [--hold GB] [--rows N] [--blocks N] [--folder DIR] [--threads N]
The layers of 32 blocks, 4096 wide, 11008 in the feed-forward part: q, k, v share their input, gate and up too. Their inputs are random rows, what runs the
blocks one after the other holds (the weights of one block, F32) is held as well. The process may not map more than the limit (RLIMIT_AS) while it records and
saves: memory that went beyond it would end the run. Opening the file maps it, so that from there on the limit is on memory that is not a file's (RLIMIT_DATA).
Needs about 30 GB of disk in the folder, which are free again at the end.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import arrow_quant_v2 as aq
import numpy as np

WIDE, FEED_FORWARD = 4096, 11008
INPUTS = {  # of a block: who reads the very same input
    WIDE: [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    FEED_FORWARD: [["mlp.down_proj"]],
}
PARAMETERS = 4 * WIDE * WIDE + 3 * WIDE * FEED_FORWARD


def rows_of(block, name, n_rows, n):
    """Inputs with columns of different size and correlation between neighbours; the same ones for the same layer."""
    random = np.random.default_rng([block, *name.encode()])
    x = random.standard_normal((n_rows, n), np.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x * np.geomspace(0.1, 10, n, dtype=np.float32)


def layers(n_blocks):
    for block in range(n_blocks):
        for n, inputs in INPUTS.items():
            for names in inputs:
                yield block, n, [f"model.layers.{block}.{name}.weight" for name in names]


def worst_error(h, x, n_sampled=64):
    """Of sampled rows of H against the product in double, relative to (H_ii H_jj)^(1/2)."""
    x = x.astype(np.float64)
    which = np.linspace(0, x.shape[1] - 1, n_sampled).astype(int)
    size = np.sqrt((x * x).mean(0))
    return float((np.abs(h[which] - x[:, which].T @ x / len(x)) / (size[which][:, None] * size)).max())


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=8.0, help="GB that the process may map (8)")
    parser.add_argument("--hold", type=float, default=5.0, help="GB that the collection may hold: max_memory (5)")
    parser.add_argument("--rows", type=int, default=512, help="rows for each input (512)")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="for the spill file and the result (the system's temporary folder)")
    arguments = parser.parse_args()
    limit = int(arguments.limit * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    with tempfile.TemporaryDirectory(prefix="calibrate-7b-", dir=arguments.folder) as folder:
        started = time.perf_counter()
        model = np.ones(PARAMETERS, np.float32)  # the block that runs
        c = aq.Calibration(max_memory=int(arguments.hold * 1e9), spill_folder=folder, data_name="random rows", synthetic=True)
        for _, n, names in layers(arguments.blocks):
            for i, name in enumerate(names):
                c.add_layer(name, n, same_input_as=names[0] if i else None)
        for block, n, names in layers(arguments.blocks):
            c.update(names[0], rows_of(block, names[0], arguments.rows, n), threads=arguments.threads)
        recorded = time.perf_counter()
        print(f"{len(c.layers)} layers, {arguments.blocks * PARAMETERS / 1e9:.2f} billion weights, {arguments.rows} rows for each input")
        print(f"recorded in {recorded - started:.0f} s; the collection holds {c.held_bytes / 1e9:.2f} GB, the block that runs {model.nbytes / 1e9:.2f} GB")
        print(f"  peak resident memory {peak_gb():.2f} GB; the process could not map more than {limit / 1e9:.1f} GB")
        sampled = [names for names in layers(arguments.blocks) if names[0] == arguments.blocks - 1]
        for block, n, names in (sampled[0], sampled[-1]):
            print(f"  {names[0]}: worst error of H {worst_error(c.hessian(names[0]), rows_of(block, names[0], arguments.rows, n)):.1e}")
        path = pathlib.Path(folder) / "7b.aqcal"
        saved = time.perf_counter()
        c.save(path)
        print(f"saved in {time.perf_counter() - saved:.0f} s: {path.stat().st_size / 1e9:.2f} GB; peak resident memory {peak_gb():.2f} GB")
        del c
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        c = aq.Calibration.open(path)
        for block, n, names in (sampled[0], sampled[-1]):
            print(f"  {names[0]} from the file: worst error of H {worst_error(c.hessian(names[0]), rows_of(block, names[0], arguments.rows, n)):.1e}")


if __name__ == "__main__":
    main()
