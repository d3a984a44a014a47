"""Quantizes the sample model at INT8, INT4 and INT2 with the arrowquant program, without and with calibration, prints what came out, and draws samples.

The quantization, the export and every size come from the program; torch and diffusers run the model to calibrate it on images, and run the exported models to
draw the picture and to measure how far their noise prediction is from the original's.
"""

import argparse
import json
import pathlib
import subprocess
import sys


def run(program, *arguments):
    """Runs the program with --json and returns what it printed."""
    done = subprocess.run([program, *map(str, arguments), "--json", "-q"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"arrowquant {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def sample(torch, scheduler, model, recorded=None, n=20, steps=20, guidance=1.5):
    """DDIM samples [n,1,28,28] from noise that depends on nothing but the seed, with classifier-free guidance.

    `recorded` collects (input, timestep, labels, prediction) of every step.
    """
    x = torch.randn((n, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.arange(n) % 10, torch.full((n,), 10)])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        pair, times = torch.cat([x, x]), t.repeat(2 * n)
        out = model(pair, timestep=times, class_labels=labels).sample
        if recorded is not None:
            recorded.append((pair, times, labels, out))
        conditional, free = out.chunk(2)
        x = scheduler.step(free + guidance * (conditional - free), t, x).prev_sample
    return x.clamp(-1, 1)


def prediction_snr_db(torch, model, recorded):
    """10 log10(sum |e|^2 / sum |e - e'|^2) of the noise prediction along the original's own sampling path."""
    signal = error = 0.0
    for x, t, labels, reference in recorded:
        out = model(x, timestep=t, class_labels=labels).sample
        signal += (reference**2).sum().item()
        error += ((out - reference) ** 2).sum().item()
    return 10 * torch.log10(torch.tensor(signal / error)).item() if error else float("inf")


def calibrate(model, scheduler, data, path):
    """Records what the layers receive while the model predicts the noise of noised images, at levels that cover the schedule."""
    from arrow_quant_v2.torch import calibrate

    calibrate(model, data, path, scheduler=scheduler, samples=256, overwrite=True, progress=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default="build/release/arrowquant")
    parser.add_argument("--model", default="examples/dit-fashion")
    parser.add_argument("--data", default="examples/fashion-calib.npz", help="images to calibrate with")
    parser.add_argument("--out", default="demo")
    parser.add_argument("--no-picture", action="store_true", help="only the table, without calibration; needs no torch")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(exist_ok=True)
    runs = [(f"INT{bits}", f"int{bits}", bits, []) for bits in (8, 4, 2)]

    if not arguments.no_picture:
        import torch
        from diffusers import DDIMScheduler, DiTTransformer2DModel
        from PIL import Image

        def load(path):
            return DiTTransformer2DModel.from_pretrained(str(path), subfolder="transformer").eval()

        scheduler, original = DDIMScheduler.from_pretrained(arguments.model, subfolder="scheduler"), load(arguments.model)
        calibrate(original, scheduler, arguments.data, out / "dit.aqcal")
        runs += [(f"INT{bits} calibrated", f"int{bits}-calibrated", bits, ["--calib", out / "dit.aqcal"]) for bits in (4, 2)]

    results = []
    for label, name, bits, options in runs:
        folder = out / name
        common = ["--bits", bits, "--group", 64, "--min-accuracy", 0.5, "--overwrite"]
        report = run(arguments.program, "quantize", arguments.model, "-o", folder, *common, *options)
        run(arguments.program, "verify", folder)
        if not arguments.no_picture:
            run(arguments.program, "export", folder, "--to", "safetensors", "-o", out / f"{name}-f32", "--dtype", "f32", "--overwrite")
        results.append((label, name, report))

    snr = {}
    if not arguments.no_picture:
        with torch.no_grad():
            recorded = []
            rows = [sample(torch, scheduler, original, recorded)]
            for label, name, _ in results:
                model = load(out / f"{name}-f32")
                snr[label] = prediction_snr_db(torch, model, recorded)
                rows.append(sample(torch, scheduler, model))
        pixels = torch.cat([row[:, 0].permute(1, 0, 2).reshape(28, -1) for row in rows])
        image = Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy())
        image.resize((2 * image.width, 2 * image.height), Image.NEAREST).save(out / "samples.png")

    source = results[0][2]["input"]
    print(f"\n{arguments.model}: {source['n_weights']:,} weights, {source['size_bytes']:,} bytes")
    print("\n                   file bytes   smaller   bits/weight   cosine    weight SQNR   noise prediction")
    for label, name, report in results:
        s = report["summary"]
        size = sum((out / name / f).stat().st_size for f in report["output"]["files"])
        print(
            f"  {label:<15} {size:>10,}   {source['size_bytes'] / size:5.2f} x   {s['bits_per_weight']:11.3f}   {s['cosine']:.5f}"
            f"   {s['sqnr_db']:8.1f} dB   " + (f"{snr[label]:13.1f} dB" if snr else "(not run)")
        )
    print("\nbits/weight: codes and parameters of the quantized layers. Embeddings, norms, biases and edge projections keep their type.")
    if snr:
        print("calibrated: the codes are chosen for what the layers receive, not for the weights alone; the noise prediction is what counts.")
        print(f"picture: {out / 'samples.png'} - rows: original, {', '.join(label for label, _, _ in results)}, from the same noise")


if __name__ == "__main__":
    main()
