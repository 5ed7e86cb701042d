"""The method written out once more with plain tensors and hand-derived gradients, from the formulas of
arXiv:2605.05341.

Shares no code with the package: no autograd, no torch.optim, no penalty functions.
"""

from __future__ import annotations

from typing import Any

import torch


class Oracle:
    def __init__(self, sae: Any, cfg: Any) -> None:
        self.cfg = cfg
        self.p = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        self.adam = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.p.items()}
        self.m = torch.ones(cfg.d_sae, dtype=torch.float64)
        self.rates = torch.zeros(cfg.d_sae, dtype=torch.float64)
        self.tau = None
        self.t = 0

    def step(self, x: torch.Tensor, l1: float, l2: float, lr: float) -> float:
        cfg, p = self.cfg, self.p
        self.t += 1
        batch = x.shape[0]
        p["W_dec"] = p["W_dec"] / (p["W_dec"] ** 2).sum(1, keepdim=True).sqrt()
        shifted = x - p["b_dec"] if cfg.apply_b_dec_to_input else x
        pre = shifted @ p["W_enc"] + p["b_enc"]
        h = torch.where(pre > 0, pre, torch.zeros_like(pre))
        x_hat = h @ p["W_dec"] + p["b_dec"]

        self.m = cfg.ema_decay * self.m + (1 - cfg.ema_decay) * h.sum(0) / batch
        floored = torch.maximum(self.m, torch.tensor(1e-5, dtype=torch.float64))
        n_top = max(1, int(cfg.d_sae * cfg.reference_fraction))
        r = torch.sort(floored, descending=True).values[:n_top].sum() / n_top
        w = ((r / floored) ** cfg.gamma).clamp(cfg.weight_min, cfg.weight_max)
        delay, ramp_steps = cfg.warmup_delay_steps, cfg.warmup_ramp_steps
        ramp = 1.0 if delay <= 0 else 0.0 if self.t < delay else min(1.0, (self.t - delay) / ramp_steps)
        u = 1 + (w - 1) * ramp
        if cfg.starvation_guard:
            self.rates = (
                cfg.guard_decay * self.rates + (1 - cfg.guard_decay) * (h > 0).double().sum(0) / batch
            )
            share = self.rates / (cfg.starvation_guard * self.rates.sum() / cfg.d_sae)
            u = u * share.clip(cfg.guard_min, 1.0)

        if cfg.penalty != "l1":
            mean_active = h.sum() / (h > 0).sum()
            self.tau = mean_active if self.tau is None else 0.99 * self.tau + 0.01 * mean_active
            a, scaled = cfg.penalty_shape, h / self.tau
            if cfg.penalty == "mcp":
                slope = torch.where(scaled < a, 1 - scaled / a, 0.0)
            elif cfg.penalty == "scad":
                slope = torch.where(scaled <= 1, 1.0, torch.where(scaled < a, (a - scaled) / (a - 1), 0.0))
            else:
                slope = 1 / (1 + scaled / a)
            u = u * slope

        loss = ((x_hat - x) ** 2).sum() / batch + l1 * (u * h).sum() / batch + l2 * (h**2).sum() / batch

        d_out = 2 * (x_hat - x) / batch
        d_h = d_out @ p["W_dec"].T + (l1 * u + 2 * l2 * h) / batch
        d_pre = torch.where(pre > 0, d_h, torch.zeros_like(d_h))
        grads = {
            "W_dec": h.T @ d_out,
            "W_enc": shifted.T @ d_pre,
            "b_enc": d_pre.sum(0),
            "b_dec": d_out.sum(0) - ((d_pre @ p["W_enc"].T).sum(0) if cfg.apply_b_dec_to_input else 0),
        }
        if cfg.remove_radial_gradient:  # rows of W_dec have norm 1 here
            along = (grads["W_dec"] * p["W_dec"]).sum(1)
            grads["W_dec"] = grads["W_dec"] - along[:, None] * p["W_dec"]
        for name, grad in grads.items():
            first, second = self.adam[name]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad**2
            self.adam[name] = (first, second)
            corrected = first / (1 - 0.9**self.t)
            p[name] = p[name] - lr * corrected / ((second / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return float(loss)
