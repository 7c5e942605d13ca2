# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers>=4.57.1,<6", "numpy"]
# ///
"""SKPO, Skip-Connected Policy Optimization (Teng et al., arXiv 2604.08690), in one file.

    python skpo.py                                        # embedded tiny model and task, on a CPU
    python skpo.py --model Qwen2.5-0.5B --data train.jsonl --eval_data test.jsonl
    torchrun --standalone --nproc_per_node 8 skpo.py ...  # several GPUs

To value every prefix of a response by sampling from it takes hundreds of samples each. SKPO values
ONE prefix a prompt: a segment s of reasoning, put AHEAD of the prompt, [s, q]. The mean reward of
the G responses from there is its Monte Carlo value. They are trained on their advantage within the
group, s on its value minus a running value of the prompt (SPO: Xu & Ding, arXiv 2509.13232).
`training_step` has it in 11 steps; `paper silent` marks a choice that the paper leaves open. The
paper's single pass over a KV cache is two rollouts here, each sharing its prompts' cache.
"""
import argparse
import inspect
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Subnormal
from functools import lru_cache, partial
from html.entities import html5
from pathlib import Path
from typing import Literal

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # KV caches grow
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributions import Categorical
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig


# ---- 1. Config: Appendix C -----------------------------------------------------------------------
@dataclass
class Config:
    """Every knob, with the paper's value where it has one. The comment beside it is its --help."""
    Ablation = Literal["none", "no_skip", "no_mc", "fixed_split", "extreme_selection"]
    model: str = "embedded"  # transformers folder or hub name; "embedded": a tiny one, built here
    data: str = ""  # JSON lines to train on, or "sums", "arithmetic"; "": built-in problems
    eval_data: str = ""  # JSON lines to evaluate on, several with commas; "": held-out ones of data
    out: str = ""  # folder of this run; "": a new one under runs/
    algo: Literal["skpo", "grpo"] = "skpo"  # grpo: the paper's baseline, no upstream
    ablation: Ablation = "none"  # a row of the paper's Table 2
    steps: int = 500  # training steps; 0: evaluation alone
    prompts_per_step: int = 128  # B, prompts in a step
    minibatches: int = 4  # optimiser steps in a training step, each on B / minibatches prompts
    group_size: int = 8  # G, samples of each prompt
    max_prompt_tokens: int = 1024  # problems with longer prompts are dropped
    max_new_tokens: int = 3072  # limit of a response, tokens
    temperature: float = 1.0  # the policy is softmax(logits / temperature), to sample and to train
    lr: float = 1e-6  # of AdamW, after the warm-up
    warmup_steps: int = 10  # training steps of linear warm-up, constant after them
    weight_decay: float = 0.1  # of AdamW; its betas are 0.9 and 0.999
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    clip_low: float = 0.2  # ratios are clipped at 1 - this; upstream and with grpo at 1 + this too
    clip_high: float = 0.28  # downstream ratios are clipped at 1 + this (Clip-Higher)
    w_up: float = 0.5  # weight of the upstream loss (eq. 4), skpo only
    w_down: float = 0.5  # weight of the downstream loss (eq. 4), skpo only
    split_low: float = 1 / 6  # t_q is drawn between split_low * L_q ...
    split_high: float = 1 / 2  # ... and split_high * L_q
    init_length: float = 1024  # L_q of a prompt not seen yet, tokens
    rho_min: float = 0.875  # trackers: least rho, after a large move of the policy
    rho_max: float = 0.96  # trackers: largest rho, after a small one
    tau: float = 8.0  # trackers: rho is 2^(-D / tau), clipped; D, how far the policy moved, in nats
    explore_eps: float = 0.05  # added to the weight with which a prompt is drawn
    template: Literal["auto", "none"] = "auto"  # auto: ask for a box, in the chat template if any
    micro_tokens: int = 4096 if torch.cuda.is_available() else 1024  # tokens in a training pass
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 on a GPU
    seed: int = 0  # the same seed gives the same numbers on the same machine, if it is a CPU
    eval_every: int = 50  # steps between evaluations, and before the first, after the last; 0: none
    eval_samples: int = 4  # k of avg@k, pass@k and maj@k: samples of each evaluation problem
    eval_problems: int = 0  # at most so many of each evaluation set; 0: all
    save_every: int = 50  # steps between checkpoints, one after the last step too; 0: that alone
    resume: bool = False  # go on with the run in --out from its last checkpoint

# Defaults of the embedded model, and of any other one without a GPU (w_up: README, "Noise")
EMBEDDED = dict(steps=100, prompts_per_step=32, max_new_tokens=24, lr=3e-4, init_length=10)
SMALL = dict(steps=20, prompts_per_step=8, minibatches=2, group_size=4, max_new_tokens=128,
             lr=1e-5, w_up=0.0, init_length=64, eval_every=10, eval_samples=1, eval_problems=16,
             save_every=10)

@dataclass
class Sample:
    """What was sampled after a prompt, and its part in the loss."""
    tokens: list  # ids, EOS included
    logprobs: list  # nats, log pi_old of each token, as it was sampled
    finished: bool  # the last token is an EOS
    prompt: list = field(default_factory=list)  # ids of what it follows: q, or [s, q]
    complete: list = field(default_factory=list)  # ids to grade and measure, if more than tokens
    text: str = ""  # of those ids, once graded
    limit: int = 0  # tokens that it may still take, while it is sampled
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the mean of eq. 5 or 6
    upstream: bool = False  # trained by eq. 6, else by eq. 5


# ---- 2. Upstream (Section 3.1): split, cut, select; the skip connection --------------------------
def split_position(length, rng, low=1 / 6, high=1 / 2):
    """Where an upstream segment pauses: t_q ~ Uniform[low * L_q, high * L_q] (eq. 2).
    length: L_q, tokens; rng: NumPy's or random's -> int, tokens, at least 1."""
    t_q = rng.uniform(low * length, high * length)
    return max(1, round(t_q))

def cut_segment(sample):
    """A segment that ended before its pause is cut to half of its length (Section 3.1).
    paper silent: EOS is not counted; an EOS on the very token of the pause is an end."""
    if not sample.finished:
        return sample
    length = len(sample.tokens) - 1
    half = max(1, length // 2)
    return replace(sample, tokens=sample.tokens[:half], logprobs=sample.logprobs[:half],
                   finished=False, complete=sample.tokens)

def select_segment(logprobs, target=np.median):
    """The segment of median surprise (Section 3.1): d(s) = mean_t -log pi(s_t | q, s_<t).
    logprobs: G lists of nats -> index of the d nearest to target(d), the first on a tie."""
    d = [-np.mean(segment) for segment in logprobs]  # [G], nats a token
    gap = np.abs(d - target(d)).round(9)  # with an even G the two middle ones tie
    return int(gap.argmin())  # the first

def skip_prompt(segment, prompt, bos_token_id=None):
    """The skip connection (Section 3.1): [s, q], the segment FIRST, then the whole prompt; lists
    of ids. paper silent: joined as they are; only a BOS that opens q moves to the very front."""
    bos = 1 if prompt[:1] == [bos_token_id] else 0
    return prompt[:bos] + segment + prompt[bos:]


# ---- 3. Values and trackers (Sections 3.1, 3.2; SPO); the choice of prompts ----------------------
def monte_carlo_value(rewards):
    """R_I(s, a) = mean_i R_II(o_i, a) (eq. 3): the value of a segment from the rewards of the
    responses that follow it, at no further cost. [B, G] of +-1 -> [B] in [-1, 1]."""
    return torch.as_tensor(rewards).double().mean(-1)

class Tracker:
    """A running mean per prompt, one for V(q) in [-1, 1], one for L_q in tokens (SPO eq. 5-7):
    x <- x + eta (observation - x), eta = 1 / (rho N + 1), N <- rho N + 1. It forgets faster the
    further the policy moved. value [size]; count [size]: N, 0 for a prompt not seen yet."""

    def __init__(self, size, initial, rho_min=0.875, rho_max=0.96, tau=8.0):
        self.value = np.full(size, float(initial))
        self.count = np.zeros(size)
        self.rho_min = rho_min
        self.rho_max = rho_max
        self.tau = tau

    def update(self, indices, observations, divergences):
        """indices [B], distinct; observations [B]; divergences [B] or one: D since the last visit,
        nats. With tau = 8 rho is rho_max at nearly every visit: a memory of 25 observations."""
        rho = 2.0 ** (-np.asarray(divergences) / self.tau)
        rho = rho.clip(self.rho_min, self.rho_max)
        N = rho * self.count[indices] + 1
        error = np.asarray(observations, float) - self.value[indices]
        self.value[indices] += error / N  # the first observation replaces the initial value
        self.count[indices] = N

def choose_prompts(values, n, rng, eps=0.05):
    """n distinct prompts, those of middling value most often: weight sqrt(v (1 - v)) + eps with
    v = (1 + V) / 2 (SPO eq. 11). values [size] in [-1, 1] -> n indices."""
    variance = np.clip(1 - values**2, 0, None) / 4  # v (1 - v)
    weight = np.sqrt(variance) + eps
    p = weight / weight.sum()
    return rng.choice(len(values), n, replace=False, p=p)


# ---- 4. Advantages and losses (Section 3.2) ------------------------------------------------------
def group_advantages(rewards):
    """Downstream: A_i = (R_i - mean R) / std R within each group; 0, not NaN, where all its R are
    equal. [B, G] -> [B, G]. paper silent: the population's std, without an epsilon."""
    R = torch.as_tensor(rewards).double()
    std, mean = torch.std_mean(R, -1, correction=0, keepdim=True)
    equal = std < 1e-9  # but for rounding
    return torch.where(equal, 0.0, (R - mean) / std)

def upstream_advantages(values, baselines):
    """Upstream: A = R_I - V(q), normalised over the batch (SPO). [B], [B] in [-1, 1] -> [B]."""
    A = torch.as_tensor(values).double() - torch.as_tensor(baselines)
    return group_advantages(A)  # here the group is the batch

def downstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.28):
    """J_down (eq. 5): -sum w sg(clip(r, 1 - low, 1 + high)) A log pi(o_t | [s, q], o_<t). The
    clipped ratio r = pi / pi_old is a constant: every token keeps a gradient. logprobs,
    old_logprobs (nats), weights [N, T], advantages [N] -> scalar. weights: 1 / (tokens of the
    prompt's G responses * prompts), 0 where padded, so that any cut into passes sums alike."""
    A = advantages[:, None]  # [N, 1]
    ratio = (logprobs.detach() - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weights * clipped * A * logprobs
    return -objective.sum()

def upstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2):
    """J_up (eq. 6): -sum w min(r A, clip(r, 1 - low, 1 + high) A), PPO's: a token clipped in its
    advantage's direction loses its gradient. Shapes as in downstream_loss; weights: 1 / (tokens of
    the segment * prompts). paper silent: no Clip-Higher, Appendix C names it downstream."""
    A = advantages[:, None]  # [N, 1]
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weights * torch.minimum(ratio * A, clipped * A)
    return -objective.sum()


# ---- 5. The training step: Section 3, in its order -----------------------------------------------
@dataclass
class State:
    """What a run carries from step to step, beside the weights and the optimiser."""
    values: Tracker  # V(q), in [-1, 1]
    lengths: Tracker  # L_q, tokens
    last: dict  # prompt index -> the segment kept at its last visit
    step: int = 0

def skip_responses(rollout, segments, tokenizer, config):
    """Steps 4 and 5: G complete responses from [s, q]. segments: B Samples -> [B][G] Samples.
    paper silent: each gets the full limit after [s, q], and L_q is measured without s."""
    bos = next(iter(tokenizer("")["input_ids"]), None)  # not bos_token_id: it may open nothing
    x = [skip_prompt(s.tokens, s.prompt, bos) for s in segments]  # [B] token ids
    return rollout(x, config.group_size)

def training_step(model, tokenizer, optimizer, problems, state, config, split=split_position,
                  select=select_segment, respond=skip_responses, outcomes=None):
    """Steps 1 to 11 on B prompts; the last four arguments are what Table 2 replaces (`ablation`).
    problems: Problems with their prompts' ids. Returns the step's row of metrics.jsonl."""
    c = config
    rng, rollout, log = begin(model, tokenizer, c, state.step)  # rollout(x, n, limits): [P][n]

    # 1. Choose B distinct prompts. V is read here: step 8 wants the value from before step 11.
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    q = [problems[i] for i in chosen]  # [B] Problems
    V = state.values.value[chosen]  # [B]

    # 2. Upstream, phase I: G segments a prompt, each paused at t_q (eq. 2), or cut to half.
    L_q = state.lengths.value[chosen]  # [B], tokens
    t_q = [split(L, rng, c.split_low, c.split_high) for L in L_q]  # [B], tokens
    t_q = np.minimum(t_q, c.max_new_tokens)
    drawn = rollout([p.ids for p in q], c.group_size, t_q)  # [B][G] Samples

    # 3. Select the segment of median surprise, drop the others.
    segments = []  # [B]
    for group in drawn:
        group = [cut_segment(s) for s in group]
        index = select([s.logprobs for s in group])
        segments.append(group[index])

    # 4. and 5. Downstream, phase II: G responses from the skip-connected prompt [s, q].
    responses = respond(rollout, segments, tokenizer, c)  # [B][G] Samples

    # 6. Rewards, and the Monte Carlo value of the segment (eq. 3).
    R_II = grade(tokenizer, q, responses)  # [B, G] of +-1
    R_I = monte_carlo_value(R_II)  # [B]
    if outcomes:
        R_I = outcomes(rollout, segments, tokenizer, q)  # [B]

    # 7. and 8. Advantages.
    A_II = group_advantages(R_II)  # [B, G]
    A_I = upstream_advantages(R_I, V)  # [B]

    # 9. The loss (eq. 4) is a mean over tokens, then over the prompts of a mini-batch.
    # paper silent: eq. 5 is read as written, a mean over the tokens of a group; Appendix C's
    # "tokens contribute equally" could be one over the tokens of the mini-batch. EOS counts.
    prompts = c.prompts_per_step // c.minibatches  # of a mini-batch
    for s, A in zip(segments, A_I.tolist()):
        s.upstream = True
        s.advantage = A
        s.weight = 1 / (len(s.tokens) * prompts)  # eq. 6
    for group, A_group in zip(responses, A_II.tolist()):
        tokens = sum(len(o.tokens) for o in group)
        for o, A in zip(group, A_group):
            o.advantage = A
            o.weight = 1 / (tokens * prompts)  # eq. 5

    # How far pi has moved since it last saw q, for step 11; step 10 moves it again.
    before = [state.last.get(i, s) for i, s in zip(chosen, segments)]  # first visit: s, no move
    drift = policy_drift(model, before, c)  # [B], nats

    # 10. One optimiser step a mini-batch.
    groups = [[s] + group for s, group in zip(segments, responses)]  # [B][1 + G]
    learn(model, optimizer, groups, responses, R_II, c, log)

    # 11. Trackers; the segments are kept to measure the drift at the next visit.
    lengths = [np.mean([len(o.complete or o.tokens) for o in group]) for group in responses]  # [B]
    state.values.update(chosen, R_I, drift)
    state.lengths.update(chosen, lengths, drift)
    state.last.update(zip(chosen.tolist(), segments))

    noise = (1 - R_I**2).mean() / (c.group_size - 1)  # variance that sampling G responses adds
    variance = (R_I - torch.tensor(V)).var(correction=0)  # of the upstream advantage, raw
    log["mc_noise"] = (noise / variance).item() if variance and not outcomes else None
    log["mc_value"] = R_I.mean().item()
    log["segment_tokens"] = np.mean([len(s.tokens) for s in segments])
    return log

@torch.no_grad()
def policy_drift(model, segments, config):
    """D, how far pi moved since it last acted on each prompt: mean_t |log pi_then - log pi_now| of
    the segment kept then. B Samples -> [B] nats. paper silent: after SPO's code, but on s alone
    (SPO: the whole response) and before the update (SPO: after it)."""
    D = torch.zeros(len(segments), device=model.device)  # 0 where another process fills it
    for rows in filter(None, micro_batches(segments, config.micro_tokens)):
        now, then, mask = now_and_then(model, [segments[i] for i in rows], config)  # [N, T] each
        D[rows] = (now - then).abs().sum(1) / mask.sum(1)
    dist.all_reduce(D)
    return D.cpu().numpy()


# ---- 6. Update: one optimiser step, cut into passes ----------------------------------------------
def learn(model, optimizer, groups, responses, rewards, config, log):
    """Step 10: `update` on each mini-batch, and the step's row of metrics.jsonl. groups [B][n],
    responses [B][G], rewards [B, G]. paper silent: the warm-up counts training steps."""
    sampled = time.perf_counter()
    log["lr"] = config.lr * min(1.0, log["step"] / max(1, config.warmup_steps))
    optimizer.param_groups[0].update(lr=log["lr"], weight_decay=config.weight_decay)
    size = len(groups) // config.minibatches
    sums = Counter()
    for b in range(0, len(groups), size):
        sums.update(update(model, optimizer, sum(groups[b:b + size], []), config))
    for name in ("clip_fraction", "ratio"):
        log[name] = sums[name] / sums["tokens"] if sums["tokens"] else None  # nothing to train on
    every = sum(responses, [])
    end = time.perf_counter()
    log.update(
        reward=rewards.mean(), accuracy=(rewards > 0).mean(),
        zero_advantage=(rewards.std(1) == 0).mean(),
        response_tokens=np.mean([len(o.complete or o.tokens) for o in every]),
        truncated=np.mean([not o.finished for o in every]),
        entropy=-np.mean(np.concatenate([o.logprobs for o in every])),  # of the sampling pi, nats
        grad_norm=sums["grad_norm"] / config.minibatches,
        rollout_seconds=sampled - log["start"], update_seconds=end - sampled,
        seconds=end - log.pop("start"), peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9)

def update(model, optimizer, samples, config):
    """One optimiser step on a mini-batch of Samples. What has no advantage has no gradient and is
    not run. paper silent: with no advantage at all nothing moves, for AdamW passes over weights
    without a gradient. Returns sums over the tokens run, and the gradient's unclipped norm."""
    c = config
    samples = [s for s in samples if s.advantage and (c.w_up if s.upstream else c.w_down)]
    sums = torch.zeros(3, device=model.device)  # tokens, ratios, clipped ones
    for rows in tqdm(micro_batches(samples, c.micro_tokens), "passes", **BAR):
        batch = [samples[i] for i in rows] or [replace(samples[-1], weight=0.0)]  # idle
        logprobs, old, mask = now_and_then(model, batch, c)  # [N, T] each
        A = logprobs.new_tensor([s.advantage for s in batch])  # [N]
        weights = mask * logprobs.new_tensor([[s.weight] for s in batch])  # [N, T]
        up = mask.new_tensor([[s.upstream] for s in batch])  # [N, 1]
        loss_up = upstream_loss(logprobs, old, A, weights * up, c.clip_low, c.clip_low)
        loss_down = downstream_loss(logprobs, old, A, weights * ~up, c.clip_low, c.clip_high)
        loss = c.w_up * loss_up + c.w_down * loss_down  # eq. 4
        loss.backward()
        ratio = (logprobs.detach() - old).exp()  # [N, T]
        high = torch.where(up, c.clip_low, c.clip_high)  # [N, 1]
        clipped = (ratio < 1 - c.clip_low) | (ratio > 1 + high)  # whatever the advantage's sign
        terms = (weights > 0) * torch.stack([mask, ratio, clipped])  # [3, N, T]
        sums += terms.sum((1, 2))
    dist.all_reduce(sums)
    shards = optimizer.param_groups[0]["params"]  # model.parameters() are gathered copies now
    norm = torch.nn.utils.clip_grad_norm_(shards, c.max_grad_norm).item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not a finite number: --resume with a lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    each_shard(model, "reshard")  # the step has moved the masters
    each_shard(model, "unshard")
    tokens, ratio, clipped = sums.tolist()
    return dict(tokens=tokens, ratio=ratio, clip_fraction=clipped, grad_norm=norm)

def now_and_then(model, samples, config):
    """log pi of the tokens of N Samples now, with gradients, and as they were sampled; their mask.
    [N, T] each, nats, 0 where padded."""
    now, mask = response_logprobs(
        model, [s.prompt for s in samples], [s.tokens for s in samples], config.temperature)
    then = now.new_tensor(sum([s.logprobs for s in samples], []))  # [sum of lengths]
    return now, torch.zeros_like(now).masked_scatter(mask, then), mask

def micro_batches(samples, limit):
    """Cuts N Samples into passes of at most `limit` tokens, padding counted, and a prompt that rows
    share counted once; a longer row goes alone. Returns this process's, lists of indices; all have
    as many, as FSDP's sums of gradients want, some of them []."""
    # like lengths together (a class spans a factor of sqrt 2), then equal prompts
    order = [(round(2 * math.log2(len(s.tokens))), s.prompt, i) for i, s in enumerate(samples)]
    passes = []
    for _, _, i in sorted(order):
        rows = passes[-1] + [i] if passes else [i]
        prompts = {tuple(samples[j].prompt) for j in rows}
        padded = len(prompts) * max(map(len, prompts))
        padded += len(rows) * max(len(samples[j].tokens) for j in rows)
        if passes and padded <= limit:
            passes[-1] = rows
        else:
            passes.append([i])
    join_processes()
    world = dist.get_world_size()
    passes += [[]] * (-len(passes) % world)
    return passes[dist.get_rank()::world]


# ---- 7. The baseline, and the ablations of Table 2 -----------------------------------------------
def grpo_step(model, tokenizer, optimizer, problems, state, config):
    """GRPO as published (Shao et al. 2024), the paper's baseline: G responses from q, PPO-clip at
    1 +- clip_low (eq. 6's form) on the group's advantages, a mean over the tokens of a response,
    then over responses, no KL. paper silent: prompts are chosen as for SKPO, with D = 0."""
    c = config
    rng, rollout, log = begin(model, tokenizer, c, state.step)
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    q = [problems[i] for i in chosen]  # [B] Problems
    responses = rollout([p.ids for p in q], c.group_size)  # [B][G] Samples
    R = grade(tokenizer, q, responses)  # [B, G]
    for o, A in zip(sum(responses, []), group_advantages(R).flatten().tolist()):
        o.upstream = True  # the form of eq. 6
        o.advantage = A
        o.weight = c.minibatches / (len(o.tokens) * R.size)  # R.size: B G responses
    c = replace(c, w_up=1.0)  # eq. 6 is the whole loss
    learn(model, optimizer, responses, responses, R, c, log)
    state.values.update(chosen, R.mean(1), 0.0)
    return log

def continued_responses(rollout, segments, tokenizer, config):
    """no_skip: G responses from [q, s]. paper silent: s + o is graded, measured, and limited."""
    limits = [max(1, config.max_new_tokens - len(s.tokens)) for s in segments]
    responses = rollout([s.prompt + s.tokens for s in segments], config.group_size, limits)
    for s, group in zip(segments, responses):
        for o in group:
            o.complete = s.tokens + o.tokens
    return responses

def own_outcomes(rollout, segments, tokenizer, problems):
    """no_mc: the outcome of one continuation from [q, s], or of the segment that ended by itself
    -> [B]. paper silent: V(q) follows it too; the continuation has the full limit."""
    paused = [s for s in segments if not s.complete]
    onward = rollout([s.prompt + s.tokens for s in paused], 1)  # [P][1]
    for s, (o,) in zip(paused, onward):
        s.complete = s.tokens + o.tokens
    return monte_carlo_value(grade(tokenizer, problems, [[s] for s in segments]))

def ablation(config, step):
    """What `training_step` takes in place of the paper's pieces."""
    end = [config.split_low, config.split_high][step % 2]
    extreme = [np.min, np.max][step % 2]  # the likeliest, the least likely
    return {
        "none": {},
        "no_skip": dict(respond=continued_responses),
        "no_mc": dict(outcomes=own_outcomes),
        "fixed_split": dict(split=lambda length, rng, *_: split_position(length, rng, end, end)),
        "extreme_selection": dict(select=partial(select_segment, target=extreme)),
    }[config.ablation]


# ---- 8. Rollouts, log-probs, evaluation ----------------------------------------------------------
NAMES = inspect.signature(transformers.Qwen2Model.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"  # what transformers calls it, by version
BAR = dict(leave=False, disable=os.environ.get("RANK", "0") != "0" or None)  # None: terminals only
CHUNK = 16  # tokens sampled between two looks at which rows have ended

def forward(model, ids, cache):
    """Runs what the cache lacks of ids [N, S + T], -1 where padded: hidden states [N, T, D]. The
    cache takes up the keys and values, and with gradients on it carries them."""
    seen = ids >= 0
    positions = (seen.cumsum(1) - 1).clamp(0)
    new = slice(cache.get_seq_length(), None)
    out = model.base_model(ids[:, new].clamp(0), attention_mask=seen.long(), use_cache=True,
                           position_ids=positions[:, new], **{CACHE: cache})
    if cache.get_seq_length() == 0:  # gradient checkpointing in train() mode drops it silently
        raise ValueError("the KV cache stayed empty")
    return out.last_hidden_state

def prefill(model, prompts):
    """N prompts -> ids [N, S], at the left padded with -1, for a pad id may be an EOS id, and a
    cache of all but the last token of each. Equal prompts are run once, in training too."""
    unique = {}  # prompt -> its row
    rows = [unique.setdefault(tuple(p), len(unique)) for p in prompts]  # [N]
    ids = [torch.tensor(p, device=model.device) for p in [*unique, (-1, -1)]]  # S is 2 at least:
    ids = pad_sequence(ids, True, -1, "left")[:-1]  # [P, S]; something must be prefilled
    cache = DynamicCache(config=model.config)
    forward(model, ids[:, :-1], cache)
    cache.batch_select_indices(rows)  # P -> N rows
    return ids[rows], cache

@torch.no_grad()
def generate(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    """n samples of each of P prompts (lists of ids) from softmax(logits / temperature) and nothing
    else; 0 is greedy. max_new_tokens: an int, or one a prompt -> [P][n] Samples. A prompt's keys
    and values are computed once; rows that have ended leave; rows take turns if memory is short."""
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    every = [Sample([], [], False, p, limit=x) for p, x in zip(prompts, limits) for _ in range(n)]
    fit = rows_that_fit(model, max([len(s.prompt) + s.limit for s in every], default=0))
    own = model.generation_config  # it steps aside: its top_k, penalties and the like are not pi
    eos = {tokenizer.eos_token_id, *np.ravel(own.eos_token_id).tolist()} - {None}
    model.generation_config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, pad_token_id=0,
        eos_token_id=sorted(eos) or None, output_scores=True, return_dict_in_generate=True)
    try:
        for i in range(0, len(every), fit):
            sample_rows(model, every[i:i + fit], eos)
    finally:
        model.generation_config = own
    return [every[i:i + n] for i in range(0, len(every), n)]  # [P][n]

def sample_rows(model, rows, eos):
    """Samples from model.generation_config until each of N Samples has an EOS or met its limit."""
    bar = tqdm(desc="sampling", unit=" tokens", **BAR)
    ids, cache = prefill(model, [s.prompt for s in rows])  # [N, S]
    while rows:
        out = model.generate(
            ids.clamp(0), attention_mask=(ids >= 0).long(), synced_gpus=False,
            max_new_tokens=min(CHUNK, max(s.limit for s in rows)), **{CACHE: cache})
        drawn = out.sequences[:, ids.shape[1]:]  # [N, drawn]
        steps = zip(out.scores, drawn.T)  # if transformers stops a step late, scores outnumber ids
        logprobs = [Categorical(logits=scores).log_prob(token) for scores, token in steps]
        logprobs = torch.stack(logprobs, 1)  # [N, drawn]
        for s, new, nats in zip(rows, drawn.tolist(), logprobs.tolist()):
            ends = [t + 1 for t, token in enumerate(new) if token in eos]
            stop = min(ends + [len(new), s.limit])
            s.tokens += new[:stop]
            s.logprobs += nats[:stop]
            s.limit -= stop
            s.finished = stop in ends
            bar.update(stop)
        staying = [j for j, s in enumerate(rows) if s.limit and not s.finished]
        bar.set_postfix_str(f"{len(staying)} responses go on")
        rows = [rows[j] for j in staying]
        ids = torch.cat([ids, drawn], 1)[staying]  # [fewer, S + drawn]
        cache.batch_select_indices(staying)
        del out  # its logits are large

def rows_that_fit(model, length):
    """How many rows of `length` tokens may be sampled at once, by their keys, values and logits."""
    _, cache = prefill(model, [[0, 0]])  # holds one token
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # bytes
    logits = 4 * (CHUNK + 4) * len(model.get_output_embeddings().weight)  # float32, some copies
    memory = 4e9  # a constant on a CPU, so that the same seed gives the same numbers
    if model.device.type == "cuda":
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        memory = 0.7 * (torch.cuda.mem_get_info()[0] + idle)
    return max(1, int(memory // (token * (length + CHUNK) + logits)))

def response_logprobs(model, prompts, responses, temperature=1.0):
    """log pi(o_t | prompt, o_<t) of each response token, with gradients: N prompts, N responses,
    lists of ids; equal prompts are run once. -> logprobs (nats) and mask [N, T], 0 where padded."""
    x, cache = prefill(model, prompts)  # [N, S]
    targets = pad_sequence([x.new_tensor(o) for o in [*responses, [-1]]], True, -1)[:-1]  # [N, T]
    mask = targets >= 0
    ids = torch.cat([x, targets], 1)  # [N, S + T]
    hidden = forward(model, ids[:, :-1], cache)  # [N, T, D], from the prompt's last token on
    head = model.get_output_embeddings()
    logprobs = chunked_logprobs(head, hidden[mask], targets[mask], temperature)  # [sum of lengths]
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), mask

def chunked_logprobs(head, hidden, targets, temperature=1.0, chunk=1024):
    """log softmax(head(hidden) / temperature)[target], nats, with gradients: hidden [M, D], targets
    [M] -> float32 [M]. A chunk's logits [chunk, V] are not kept, the backward pass recomputes."""
    def piece(h, target):
        logits = head(h).float() / temperature  # [m, V]
        return -torch.nn.functional.cross_entropy(logits, target, reduction="none")  # [m]
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(piece, *pair, use_reentrant=False) for pair in chunks])

def grade(tokenizer, problems, groups):
    """+1 where the last box of a response holds the answer, else -1: B Problems and [B][n] Samples,
    which get their text -> NumPy's [B, n]."""
    for s in sum(groups, []):
        s.text = tokenizer.decode(s.complete or s.tokens, skip_special_tokens=True)
    right = [[is_correct(s.text, p.answer) for s in group] for p, group in zip(problems, groups)]
    return 2.0 * np.array(right) - 1

def evaluate(model, tokenizer, problems, config):
    """k samples of each of P problems, from q alone. accuracy: avg@k, the share of right ones;
    pass_at_k: of problems with one; majority: maj@k, of problems whose most frequent answer is."""
    _, rollout, _ = begin(model, tokenizer, config, 10**9)  # the same draws at every evaluation
    k = config.eval_samples if config.temperature else 1
    groups = rollout([p.ids for p in problems], k)  # [P][k]
    right = grade(tokenizer, problems, groups) > 0  # [P, k]
    majority = []
    for p, group in zip(problems, groups):
        boxes = [extract_answer(s.text) for s in group]
        votes = Counter(normal_form(box) for box in boxes if box)
        majority.append(normal_form(p.answer) in dict(votes.most_common(1)))
    return dict(accuracy=right.mean(), pass_at_k=right.any(1).mean(), majority=np.mean(majority),
                samples=k, problems=len(problems))


# ---- 9. Rewards: is the last box right? ----------------------------------------------------------
# Answers are equal if their normal forms are. Model output is untrusted: it is read, never run.

NUMBERS = Context(prec=300, Emin=-100, Emax=100,
                  traps=[Overflow, Subnormal, DivisionByZero, InvalidOperation])  # beyond 10^+-100
ROUNDED = Context(prec=210)  # what is compared
TIDY = [  # in this order
    (r"\\[lc]?dots(?![a-zA-Z])|\.\.+", "…"), (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\\begin\{[pb]?matrix\}", "(("), (r"(\\\\)?\s*\\end\{[pb]?matrix\}", "))"),
    (r"\\\\", "),("), ("&", ","),  # a matrix is a tuple of its rows
    (r"infinity|\\infty|∞", "Ω"), (r"(?<![\\a-z])pi\b", "π"),
    (r"(?<=\d)(\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # 12{,}345
    (r"([\d.]+)[eE]([-+]?\d+)", r"(\1*10^\2)"),
    (r"\\(left|right|displaystyle|[bB]igg?[lr]?|q?quad)(?![a-zA-Z])|\\[!,;:> ()]|\\?[%$]|~", " "),
    (r"\\((text|math)\w*|mbox|boldsymbol)\s*\{([^{}]*)\}", r" \3 "), (r",?\s*\b(and|or)\b", ","),
    (r"\\([a-z]+)(?![a-zA-Z])", lambda m: html5.get(m[1] + ";", m[0])),  # \pi is π, \cdot ċ
    ("−", "-"), ("[×·ċ]", "*"), ("÷", "/"), (r"\*\*", "^"), (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"(?<![\d.,\s])\s+|\s+(?![\d.,])|[.,\s]+$", ""),  # the space of 2 3 or 12, 144 stays
    (r"_(\w) (?=\d)", r"_{\1}"),  # log_2 3
    (r"((?:sin|cos|tan|cot|csc|sec).*)|\^\{?ˆ\}?|°", lambda m: m[1] or "degrees"),
    (r"(?<=[\d})π])(square|cubic)?([cmk]m|in|ft|feet|mph|kg|percent|inch(es)?|degrees[CF]|(meter|"
     r"mile|gram|unit|pound|hour|minute|second|day|week|year|dollar|cent|degree|liter|point)s?)"
     r"(\^\{?[23]\}?)?(?=,|$)", ""),
    (r"(?<!\d)\{(\w)\}(?![\d!])", r"\1"),  # x^{2} is x^2
    (r"^((?:[^\W\d]|[A-Z]{2,3})?(?:_\{?\w+\}?)?(?:\([a-zA-Z,]+\))?)[=∈]((?:[^=∈]|,\1=)*)$",
     lambda m: m[2].replace(f",{m[1]}=", ",")),  # f(x)=5; x=1,x=2
    (r"^[-+]?\d{1,3}(,\d{3})+(\.\d+)?$", lambda m: m[0].replace(",", "")),  # 1,000
    (r"\s*,\s*", ","),
    (r"^[a-zA-Z]{2,}$", lambda m: "'" + m[0].lower()),  # a word is not a product
    ("_", "~"), (r"\\?sqrt\[(\w+)\]", r"\\root{\1}"), (r"\\?sqrt", r"\\root2"),  # \root{3}{8} is 2
    (r"(?<![\w}.^~/])(?<!\d )(\d+) ?((?<= )\d+/\d+|\\frac(?:\d|\{\d+\}){2})", r"(\1+\2)"),  # 2 1/2
    (r"(?<![\w.)~])(\d\d?)!(?!!)", lambda m: f"({math.factorial(int(m[1]))})")]  # 5!

def extract_answer(text):
    r"""What the last complete \boxed{...} in text holds; None if none or empty. One pass."""
    ends = []  # of } that no { has met yet, from the right
    for token in reversed([*re.finditer(r"(\\boxed\s*|)\{|\}|\\.", text, re.DOTALL)]):
        if token[0] == "}":
            ends.append(token.start())
        elif token[1] is not None and ends:
            content = text[token.end():ends.pop()]
            if token[1]:  # of nested boxes, the inner one
                return content.strip() or None

def is_correct(response, answer):
    """Whether the last box of response (text) holds answer (text or number). Never raises."""
    given = extract_answer(response)
    return given is not None and normal_form(given) == normal_form(str(answer))

@lru_cache(10**4)  # a reference is compared with every response to it
def normal_form(text):
    """What equal answers share: their values, or the text tidied. Hashable."""
    for pattern, new in TIDY:
        if len(text) > 300 or re.search("[一-鿿]", text):  # `value` puts these for brackets
            return text
        text = re.sub(pattern, new, text)
    try:  # with letters of either sign: |x| is not x
        return tuple(value(f"[{{{text}}}]", {"sign": sign}) for sign in (1, -1))
    except Exception:  # no expression, or too large
        return text

def power(left, right):
    """left^right; of a negative number, an odd root is the real one, another an arbitrary one."""
    if left < 0 and right % 1:
        odd = ROUNDED.divide(1, right) % 2 == 1
        sign = -1 if odd else NUMBERS.power(Decimal("1.37"), right)
        return NUMBERS.multiply(sign, power(NUMBERS.minus(left), right))
    return NUMBERS.power(left, right)

OPERATORS = [  # the weakest first; a sign is a sum without its left side
    (r"(.*[^-+*/^]|)\+(.+)", NUMBERS.add), (r"(.*[^-+*/^]|)-(.+)", NUMBERS.subtract),
    (r"(.+)(?:\*|(?<=\w)(?=[^\W\d]))(.+)", NUMBERS.multiply),  # 2x is a product
    (r"(.+)/(.+)", NUMBERS.divide), (r"(.+?)\^(.+)", power)]

def value(text, known):
    """The number or tuple that text stands for. Brackets become letters of known, one by one."""
    text = re.sub(r"\\frac(\w) ?(\w)", r"(\1/\2)", text)
    text = re.sub(r"\\root(\w)(\w)", r"(\2^(1/\1))", text)
    text = re.sub(r"(?<!∪)\w(∪\w)+(?!∪)", lambda m: f"«{m[0].replace('∪', ',')}»", text)
    if bracket := re.search(r"(\\?[\[({«])([^][(){}«»\\]*)\\?([])}»])", text):  # innermost
        opening, inside, closing = bracket.groups()
        items = [value(item, known) for item in inside.split(",")]
        if len(items) > 1 or opening + closing not in ("()", "{}"):
            items = [x if isinstance(x, tuple) else ROUNDED.normalize(x) for x in items]
            items = sorted(items, key=str) if closing in "}»" else items
            items = [(opening[-1] + closing, *items)]
        letter = chr(ord("一") + len(known))
        return value(text.replace(bracket[0], letter), {**known, letter: items[0]})
    for pattern, operator in OPERATORS:
        if sides := re.fullmatch(pattern, text):
            return operator(*(value(side or "0", known) for side in sides.groups()))
    if re.fullmatch(r"[a-zA-Zͱ-Ͽ](~[0-Ͽ])?", text):  # but e and π are never negative
        return Decimal((text in "eπ" or known["sign"]) * random.Random(text).uniform(1, 2))
    return known[text] if text in known else NUMBERS.create_decimal(text)


# ---- 10. Problems, prompts, the model ------------------------------------------------------------
class UserError(Exception):
    """A mistake that its maker can mend: shown as one line, without a traceback."""

@dataclass
class Problem:
    """A question, its reference answer and, once it is tokenised, the ids of its prompt."""
    question: str
    answer: str
    ids: list = None

def load_problems(source):
    """The Problems of a JSON-lines file ("question" or "problem", and "answer": text, number, or
    GSM8K's "... #### 18"), or built-in ones: "sums" of six digits, modulo 10; "arithmetic"."""
    rng = np.random.default_rng(20260409)
    if source == "sums":
        rows = rng.permutation(10**6)[:2048]
        return [Problem(f"{row:06d}", str(sum(map(int, str(row))) % 10)) for row in rows]
    if source == "arithmetic":
        rows = np.unique(rng.integers(2, 100, (2048, 3)), axis=0)
        return [Problem(f"What is {a} + {b} * {c}?", str(a + b * c)) for a, b, c in rows]
    problems = []
    for number, line in enumerate(Path(source).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = row.get("question", row.get("problem"))
            question = question.encode(errors="replace").decode()  # no lone surrogates
            answer = str(row["answer"]).rsplit("####", 1)[-1].strip()
            if not question.strip() or not answer or type(row["answer"]) not in (str, int, float):
                raise ValueError
        except Exception:  # whatever a line may hold
            raise UserError(f'{source}, line {number}: not a JSON object with a "question" or '
                            '"problem" (text) and an "answer" (text or number)') from None
        problems.append(Problem(question, extract_answer(answer) or answer))
    return problems

def prompt_ids(tokenizer, question, template="auto"):
    """The ids of a prompt; "auto": with a request for a box, and in the chat template if any."""
    if template == "auto":
        question += "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question.strip()}]
            return tokenizer.apply_chat_template(  # some templates tell the date
                messages, add_generation_prompt=True, return_dict=False, date_string="1 Jan 2026")
    ids = tokenizer(question)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some end each text with EOS

def load_model(config):
    """(model, tokenizer), float32, on a GPU if any; no remote code, no pickle. Refused if log-probs
    through a shared cache are wrong: recurrent states, scaled or capped logits, broken weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = config.model
    if source == "embedded":
        torch.set_num_threads(1)  # so small a model only has threads wait for one another
        model, tokenizer = embedded_model(config.seed, steps=0 if config.resume else 400)
        return model.to(device), tokenizer
    if re.match("(?i)qwen[^/]*$", source) and not Path(source).exists():
        source = f"Qwen/{source}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32,
                                                     use_safetensors=True)
        model.eval().to(device)  # no dropout: pi at the update is the pi that sampled
        rows = [[1, 2, 3], [3, 1], [3, 1]]  # the last is padded, and a copy
        shared, _ = response_logprobs(model, rows, [[4], [5, 4], [5, 4]])  # [3, 2]
        logits = model(torch.tensor([[3, 1, 5, 4]], device=device)).logits[0]  # [4, V]
        plain = logits.float().log_softmax(1)[[1, 2], [5, 4]]  # [2]: of 5 and 4, after 3 and 1
        if not torch.allclose(shared[2], plain, atol=1e-3):
            raise ValueError("log-probs through a shared KV cache are not those of a plain pass")
        prompt_ids(tokenizer, "", config.template)  # a chat template may refuse
    except Exception as error:  # folders, hubs and architectures have many ways to be wrong
        raise UserError(f"cannot use --model {source}: {error or repr(error)}") from None
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model, tokenizer

def embedded_model(seed, steps=400, batch=64, slips=0.2):
    """A character-level Qwen2 of 75k parameters that stands in for a pretrained model: supervised
    for seconds on worked digit sums in which one step in five slips, so that it knows how, yet is
    often wrong. In half of the documents an attempt stands ahead of the problem, as in [s, q]."""
    import tokenizers
    words = [*"0123456789=", "\\boxed{", "}", "<eos>", "<unk>"]
    unigram = tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=14)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(unigram), eos_token="<eos>", unk_token="<unk>")
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.chat_template = "{{ messages[0]['content'].split('\\n')[0] }}="  # the digits and "="
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=15, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=13,
        pad_token_id=13, initializer_range=0.1))  # with 0.02 it starts ten times later
    rng = np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(model.parameters())
    equals, box, close, eos = np.arange(10, 14).repeat(batch).reshape(4, batch, 1)
    for step in tqdm(range(steps), "warm-up of the embedded model", **BAR):
        digits = rng.integers(10, size=(batch, 6))
        slip = rng.integers(1, 10, (batch, 6)) * (rng.random((batch, 6)) < slips)
        work = (digits + slip).cumsum(1) % 10  # [batch, 6]: running sums, a slip carried on
        attempt = (work + slip[::-1]) % 10  # [batch, 6]: the same with another row's slips
        cut = rng.integers(1, 7, (batch, 1)) * (rng.random((batch, 1)) < 0.5)  # 0: nothing ahead
        attempt[np.arange(6) >= cut] = -1
        text = [attempt, digits, equals, work, box, work[:, -1:], close, eos]
        ids = torch.tensor(np.hstack(text))  # [batch, 23]
        hidden = forward(model, ids, DynamicCache(config=model.config))
        logits = model.lm_head(hidden[:, 12:-1])  # [batch, 10, V], of what follows "="
        torch.nn.functional.cross_entropy(logits.mT, ids[:, 13:]).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


# ---- 11. Several processes (torchrun); one process is a group of one -----------------------------
def join_processes():
    """torchrun's processes, one a GPU, or several on the CPU; without torchrun a group of this one
    alone, so that nothing below asks how many there are. The first one prints. Joins once."""
    if dist.is_initialized():
        return
    alone = {} if "LOCAL_RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(**alone)  # gloo for the CPU, nccl for GPUs
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")

def shard(model, config):
    """FSDP2: float32 master weights, gradients and moments, of which each process holds its part;
    compute and KV cache in --dtype. The weights that compute stay whole between optimiser steps: no
    process waits for another while it samples. One CPU process in float32 goes without."""
    cuda = model.device.type == "cuda"
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
    if not (cuda or bf16 or dist.get_world_size() > 1):
        return
    # cuDNN attention: NaN gradients on H100/H200, masked and 64 modulo 128 long (pytorch 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else torch.float32, torch.float32)
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    for module in blocks + [model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1)  # a sum: a weight is a row's part in the whole batch
        module.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        model(torch.tensor([[0]], device=model.device))  # makes model the root
    each_shard(model, "reshard")  # an optimiser wants the masters

def each_shard(model, do):
    """reshard: frees the weights that compute; unshard: makes them of the masters, if not there."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            getattr(module, do)()


# ---- 12. The run: log, checkpoint, loop, command line --------------------------------------------
def begin(model, tokenizer, config, step):
    """(rng, rollout, log). rng is NumPy's, the same in all processes; torch's is another in each.
    Both are seeded by seed and step alone: a checkpoint holds no state of theirs. rollout(prompts,
    n, limits) -> [P][n] Samples is `generate`, the prompts dealt out to the processes."""
    join_processes()
    rank, world = dist.get_rank(), dist.get_world_size()
    rng = np.random.default_rng([config.seed, step])
    torch.manual_seed(int(rng.integers(2**62)) + rank)
    each_shard(model, "unshard")
    log = dict(step=step, start=time.perf_counter(), tokens=0)

    def rollout(prompts, n, limits=config.max_new_tokens):
        limits = np.broadcast_to(limits, len(prompts))[rank::world]
        mine = generate(model, tokenizer, prompts[rank::world], n, limits, config.temperature)
        parts = [None] * world
        dist.all_gather_object(parts, mine)
        groups = [parts[i % world][i // world] for i in range(len(prompts))]
        log["tokens"] += sum(len(s.tokens) for s in sum(groups, []))
        return groups
    return rng, rollout, log

def load_data(config, model, tokenizer):
    """Problems to train on, and {name: problems} to evaluate on, with their prompts' ids. Without
    --eval_data an eighth, at most 256, is held out, the same ones whatever the seed."""
    c = config
    train = load_problems(c.data or ("sums" if c.model == "embedded" else "arithmetic"))
    most = c.eval_problems or None
    tests = {name: load_problems(name)[:most] for name in c.eval_data.split(",") if name}
    if not tests:
        np.random.default_rng(0).shuffle(train)
        held = min(256, len(train) // 8 or 1)
        tests = {"held-out": train[:held][:most]}
        train = train[held:]
    context = getattr(model.config, "max_position_embeddings", math.inf)
    segment = math.ceil(c.split_high * max(c.init_length, c.max_new_tokens))  # of the longest L_q
    room = context - c.max_new_tokens - min(c.max_new_tokens, segment)
    room = min(room, c.max_prompt_tokens)
    for name, problems in {"--data": train, **tests}.items():
        for p in problems:
            p.ids = prompt_ids(tokenizer, p.question, c.template)
        fit = [p for p in problems if 0 < len(p.ids) <= room]
        print(f"{name}: {len(fit)} of {len(problems)} problems have prompts of 1 to {room} tokens")
        problems[:] = fit
        if len(fit) < (c.prompts_per_step if problems is train and c.steps else 1):
            raise UserError(f"{name}: {len(fit)} problems are too few: lower --prompts_per_step, "
                            "or --max_new_tokens for more context, or raise --max_prompt_tokens")
    return train, tests

WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """The model, and all that a run needs to go on in one file that takes its name by a rename: a
    kill leaves the old one or the new. What the log holds beyond `size` is cut off on resume."""
    weights, moments = sharded.get_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank():
        return
    V, L = state.values, state.lengths
    trackers = torch.tensor(np.array([V.value, V.count, L.value, L.count]))  # [4, problems]
    last = {i: vars(s) for i, s in state.last.items()}
    size = (out / "metrics.jsonl").stat().st_size
    try:
        tokenizer.save_pretrained(out / "model")
        model.save_pretrained(out / "model", state_dict=dict(weights))  # which it empties
        torch.save((weights, moments, trackers, last, state.step, size), out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")  # last: this counts as done
    except Exception as error:  # a full disk has many names
        raise UserError(f"no checkpoint saved, an older one is untouched: {error}") from None

def load_checkpoint(out, model, optimizer, state):
    """Puts model, optimizer, state and the log back where save_checkpoint saw them."""
    V, L = state.values, state.lengths
    try:
        saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        weights, moments, trackers, last, state.step, size = saved
        if trackers.shape[1] != len(V.value):
            raise ValueError(f"it knows {trackers.shape[1]} problems, --data has {len(V.value)}")
        V.value, V.count, L.value, L.count = trackers.numpy().copy()
        state.last = {i: Sample(**s) for i, s in last.items()}
        sharded.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments,
                               options=WHOLE)
    except Exception as error:  # whatever a file may hold
        raise UserError(f"cannot resume from {out}: {error}") from None
    os.truncate(out / "metrics.jsonl", size)

def train(config):
    """Evaluates, trains config.steps steps, evaluates again. Returns the run's folder."""
    c = config
    check_config(c)
    join_processes()
    out = Path(c.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{c.algo}-{c.seed}")
    model, tokenizer = load_model(c)
    problems, tests = load_data(c, model, tokenizer)
    shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # `learn` sets lr, decay
    trackers = [Tracker(len(problems), x, c.rho_min, c.rho_max, c.tau) for x in (0, c.init_length)]
    state = State(*trackers, {})
    if c.resume:
        load_checkpoint(out, model, optimizer, state)
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.tmp").write_text(json.dumps(vars(c), indent=1))
        os.replace(out / "config.tmp", out / "config.json")
    print(f"{c.model}: {model.num_parameters() / 1e6:.2f}M parameters, {dist.get_world_size()} x "
          f"{model.device}\n{out}: {c.algo}, ablation {c.ablation}, steps {state.step + 1} to "
          f"{c.steps} of {c.prompts_per_step} prompts x {c.group_size} responses of up to "
          f"{c.max_new_tokens} tokens")

    def log(row, keys, note):
        shown = "".join(f"  {key} {row[key]:.3f}" for key in keys)
        tqdm.write(f"step {state.step:4d}{shown}  {note}")
        if dist.get_rank() == 0:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    first = {}  # accuracy of each evaluation set when this process evaluated it first
    method = {"skpo": training_step, "grpo": grpo_step}[c.algo]
    for state.step in range(state.step + c.resume, c.steps + 1):  # resumed: after the saved step
        last = state.step == c.steps
        if state.step:  # step 0 only evaluates
            row = method(model, tokenizer, optimizer, problems, state, c, **ablation(c, state.step))
            left = f"{row['seconds'] * (c.steps - state.step) / 60:.0f} min to go"
            log(row, ("reward", "response_tokens", "zero_advantage", "seconds"), left)
        if not c.steps or c.eval_every and (last or state.step % c.eval_every == 0):
            for name, test in tests.items():
                row = dict(step=state.step, data=name, **evaluate(model, tokenizer, test, c))
                worse = row["accuracy"] < first.setdefault(name, row["accuracy"])
                note = "  lower than at first: try --w_up 0, or a lower --lr" if worse else ""
                log(row, ("accuracy", "pass_at_k", "majority"), f"on {name}{note}")
        if state.step and (last or c.save_every and state.step % c.save_every == 0):
            save_checkpoint(out, model, tokenizer, optimizer, state)
    return out

# What a Config must be. Of a rule that is broken the user is shown the text behind #, or itself.
RULES = """lr > 0; tau > 0; init_length > 0; max_grad_norm > 0; explore_eps > 0; eval_samples > 0
    max_new_tokens > 0; max_prompt_tokens > 0; prompts_per_step > 0; minibatches > 0
    prompts_per_step % minibatches == 0; group_size >= 2; clip_low < 1; rho_min <= rho_max <= 1
    0 < split_low <= split_high <= 1; temperature > 0 or steps == 0; micro_tokens > 0
    algo == 'skpo' or ablation == 'none'; not resume or out and steps  # --resume needs --out, steps
    not resume or Path(out, 'checkpoint.pt').is_file()  # --resume: there is no checkpoint in --out
    resume or not out or not any(Path(out).glob('*'))  # --out is not empty: --resume, or another
    model[:1] not in ('.', '/', '~') or Path(model).is_dir()  # --model: there is no such folder
    model != 'embedded' or data == eval_data == ''  # --data and --eval_data need a --model"""

def parse_config(argv):
    """The command line as a Config. Defaults are the paper's, but the embedded model, a machine
    without a GPU and a resumed run have their own. A comment in Config is its flag's help."""
    for name, text in re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)):
        Config.__dataclass_fields__[name].metadata = {"help": text}
    parser = transformers.HfArgumentParser(Config, usage=argparse.SUPPRESS, allow_abbrev=False,
                                           description=parse_config.__doc__)
    first = parser.parse_args(argv)
    saved = Path(first.out, "config.json")
    if first.resume and first.out and saved.is_file():
        parser.set_defaults(**json.loads(saved.read_text()))
    elif first.model == "embedded":
        parser.set_defaults(**EMBEDDED)
    elif not torch.cuda.is_available():
        parser.set_defaults(**SMALL)
        paper = " ".join(f"--{name} {getattr(Config, name)}" for name in SMALL)
        print(f"no GPU: a small plan, for what no flag sets; the paper's: {paper}")
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]

def check_config(config):
    """Raises UserError for flags that make no sense. What is evaluated is RULES, never input."""
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: wanted is a number from 0 up")
    for rule in re.split(r"\s*[;\n]\s*", RULES):
        condition, _, words = rule.partition("  # ")
        if not eval(condition, {"Path": Path}, vars(config)):
            raise UserError(words or f"wrong flags: wanted is {condition}")
    for path in [config.data, *config.eval_data.split(",")]:  # before minutes go by for the model
        if path not in ("", "sums", "arithmetic") and not Path(path).is_file():
            raise UserError(f"there is no file {path}")

def main(argv=None):
    """Runs; a mistake of the user's ends in one line and an exit code that is not 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        train(parse_config(argv))
        dist.barrier()  # none leaves while another still saves
        dist.destroy_process_group()
    except (UserError, OSError, json.JSONDecodeError) as error:
        sys.exit(" ".join(f"skpo.py: {error}".split())[:400])
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("skpo.py: out of memory: lower --micro_tokens, --group_size or --max_new_tokens")
    except KeyboardInterrupt:
        sys.exit("skpo.py: interrupted; --resume --out FOLDER goes on from the last checkpoint")

if __name__ == "__main__":
    main()
