"""GPTQ as the paper has it (Frantar et al., ICLR 2023, Algorithm 1), in plain torch: what ours is compared with in speed and quality."""

import torch


def parameters(x, top, search):
    """Scale and offset, rounded to halves, of each row of x [out, group]: from its range, or with `search` from the best of 80 shrunk ranges, as the paper's
    code does when asked to."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    best, scale, offset = torch.full_like(low, float("inf")), low, high
    for i in range(80 if search else 1):
        s, o = ((high - low) * (1 - i / 100) / top).clamp(min=1e-6).half().float(), (low * (1 - i / 100)).half().float()
        if not search:
            return s, o
        q = ((x - o[:, None]) / s[:, None]).round_().clamp_(0, top)
        error = (q.mul_(s[:, None]).add_(o[:, None]).sub_(x)).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset


def gptq(w, h, bits, group, damp=0.01, block=128, search=False):
    """w [out, n], h [n, n] second moment. A group's scale and offset come from the updated weights when it is entered.

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
                scale, offset = parameters(entered, top, search)
            q = ((x[:, i] - offset) / scale).round().clamp(0, top)
            values[:, begin + i] = q * scale + offset
            errors[:, i] = (x[:, i] - values[:, begin + i]) / own[i, i]
            x[:, i + 1 :] -= errors[:, i : i + 1] * own[i : i + 1, i + 1 :]
        w[:, end:] -= errors @ u[begin:end, end:]
    return values, len(w) * (-(-n // group))
