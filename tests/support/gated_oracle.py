"""The gated method written out with plain tensors and hand-derived gradients; shares no code with the package."""

from __future__ import annotations

from typing import Any

import torch

_PARAMETERS = ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")


class GatedOracle:
    def __init__(self, sae: Any, cfg: Any) -> None:
        self.cfg = cfg
        self.p = {name: getattr(sae, name).detach().clone() for name in _PARAMETERS}
        self.adam = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in self.p.items()}
        self.m = torch.ones(cfg.d_sae, dtype=torch.float64)
        self.rates = torch.zeros(cfg.d_sae, dtype=torch.float64)
        self.tau = None
        self.t = 0

    def step(self, x: torch.Tensor, l1: float, l2: float, lr: float) -> dict[str, float]:
        cfg, p, batch = self.cfg, self.p, x.shape[0]
        self.t += 1
        p["W_dec"] = p["W_dec"] / (p["W_dec"] ** 2).sum(1, keepdim=True).sqrt()
        shifted = x - p["b_dec"] if cfg.apply_b_dec_to_input else x
        scale = p["r_mag"].exp()
        u = shifted @ p["W_enc"]
        pi, a = u + p["b_gate"], scale * u + p["b_mag"]
        is_open, is_on = (pi > 0).double(), (a > 0).double()
        s, h = pi * is_open, a * is_on * is_open
        x_hat, via_gate = h @ p["W_dec"] + p["b_dec"], s @ p["W_dec"] + p["b_dec"]

        cost = self._cost(s, batch)
        d_out, d_via = 2 * (x_hat - x) / batch, 2 * (via_gate - x) / batch
        d_a = d_out @ p["W_dec"].T * is_open * is_on
        d_pi = (d_via @ p["W_dec"].T + (l1 * cost + 2 * l2 * s) / batch) * is_open
        d_u = d_a * scale + d_pi
        grads = {
            "W_enc": shifted.T @ d_u,
            "b_gate": d_pi.sum(0),
            "r_mag": (d_a * u * scale).sum(0),
            "b_mag": d_a.sum(0),
            "W_dec": h.T @ d_out,
            "b_dec": d_out.sum(0) - (d_u.sum(0) @ p["W_enc"].T if cfg.apply_b_dec_to_input else 0),
        }
        for name, grad in grads.items():
            first, second = self.adam[name]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            self.adam[name] = (first, second)
            corrected = first / (1 - 0.9**self.t)
            p[name] = p[name] - lr * corrected / ((second / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return {
            "mse_loss": float(((x_hat - x) ** 2).sum() / batch),
            "auxiliary_reconstruction_loss": float(((via_gate - x) ** 2).sum() / batch),
            "l1_loss": float(l1 * (cost * s).sum() / batch),
            "l2_loss": float(l2 * (s**2).sum() / batch),
        }

    def _cost(self, s: torch.Tensor, batch: int) -> torch.Tensor:
        """What a unit of each activation of the gate costs, before the coefficient."""
        cfg = self.cfg
        self.m = cfg.ema_decay * self.m + (1 - cfg.ema_decay) * s.sum(0) / batch
        floored = torch.maximum(self.m, torch.tensor(1e-5, dtype=torch.float64))
        n_top = max(1, int(cfg.d_sae * cfg.reference_fraction))
        r = torch.sort(floored, descending=True).values[:n_top].sum() / n_top
        w = ((r / floored) ** cfg.gamma).clamp(cfg.weight_min, cfg.weight_max)
        self.rates = cfg.guard_decay * self.rates + (1 - cfg.guard_decay) * (s > 0).double().sum(0) / batch
        share = self.rates / (cfg.starvation_guard * self.rates.sum() / cfg.d_sae)
        cost = w * share.clip(cfg.guard_min, 1.0) + torch.zeros_like(s)
        if cfg.penalty == "mcp":
            mean_active = s.sum() / (s > 0).sum()
            self.tau = mean_active if self.tau is None else 0.99 * self.tau + 0.01 * mean_active
            scaled = s / self.tau
            cost = cost * torch.where(scaled < cfg.penalty_shape, 1 - scaled / cfg.penalty_shape, 0.0)
        return cost
