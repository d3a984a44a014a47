"""GPTQ as the paper has it (Frantar et al., ICLR 2023, Algorithm 1), in plain torch: what ours is compared with in speed and quality."""

import torch


def gptq(w, h, bits, group, damp=0.01, block=128):
    """w [out, n], h [n, n] second moment. Min-max scale and offset, rounded to halves, from the updated weights when a group is entered.

    Returns the values and the number of groups.
    """
    w, h = w.clone().float(), h.clone().float()
    n, top = w.shape[1], 2**bits - 1
    dead = h.diagonal() == 0
    h[dead, dead], w[:, dead] = 1, 0
    h += damp * h.diagonal().mean() * torch.eye(n)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    values = torch.zeros_like(w)
    for begin in range(0, n, block):
        end = min(begin + block, n)
        x, errors, own = w[:, begin:end].clone(), torch.zeros(len(w), end - begin), u[begin:end, begin:end]
        for i in range(end - begin):
            if (begin + i) % group == 0:
                stop = min(begin + i + group, n)
                entered = torch.cat([x[:, i : min(i + group, end - begin)], w[:, end:stop]], 1)
                low, high = entered.amin(1).clamp(max=0), entered.amax(1).clamp(min=0)
                scale, offset = ((high - low) / top).clamp(min=1e-6).half().float(), low.half().float()
            q = ((x[:, i] - offset) / scale).round().clamp(0, top)
            values[:, begin + i] = q * scale + offset
            errors[:, i] = (x[:, i] - values[:, begin + i]) / own[i, i]
            x[:, i + 1 :] -= errors[:, i : i + 1] * own[i : i + 1, i + 1 :]
        w[:, end:] -= errors @ u[begin:end, end:]
    return values, len(w) * (-(-n // group))
