"""The tests of skpo.py, each against independent arithmetic or a plain forward pass. Small models, CPU, under 3 minutes."""
import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the models are small: on a busy machine threads only wait for one another

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import skpo
from skpo import Config, Problem, Sample, Tracker

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny():
    """A random model of two layers, float32, and the embedded tokenizer."""
    return skpo.embedded_model(0, steps=0)


@pytest.fixture(scope="session")
def warm():
    """The embedded model after its supervised warm-up."""
    return skpo.embedded_model(0)


def plain_logprobs(model, prompt, response, temperature=1.0):
    """One uncached, unpadded forward per sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def config(tmp_path=None, **kwargs):
    return Config(**{**skpo.EMBEDDED, "out": str(tmp_path / "run") if tmp_path else "", **kwargs})


def rows_of(path, key=None):
    rows = [json.loads(line) for line in open(path / "metrics.jsonl", encoding="utf-8")]
    return [r for r in rows if key is None or key in r]


# ---- Config ---------------------------------------------------------------------------------------------------------

def test_defaults_are_the_papers():
    c = Config()
    assert (c.lr, c.warmup_steps, c.weight_decay, c.max_grad_norm, c.steps) == (1e-6, 10, 0.1, 1.0, 500)
    assert (c.prompts_per_step, c.minibatches, c.group_size, c.max_prompt_tokens, c.max_new_tokens) == (128, 4, 8, 1024, 3072)
    assert (c.clip_low, c.clip_high, c.w_up, c.w_down, c.temperature) == (0.2, 0.28, 0.5, 0.5, 1.0)
    assert (c.split_low, c.split_high, c.init_length) == (1 / 6, 1 / 2, 1024)
    assert (c.rho_min, c.rho_max, c.tau, c.explore_eps) == (0.875, 0.96, 8, 0.05)
    assert skpo.parse_config(["--model", "x"]) == replace(c, model="x")


def test_the_embedded_model_brings_defaults_for_what_is_not_set():
    c = skpo.parse_config(["--lr", "0.5"])
    assert c.lr == 0.5 and c.steps == skpo.EMBEDDED["steps"] and c.weight_decay == 0.1


# ---- Problems and rewards -------------------------------------------------------------------------------------------

def test_problem_files(tmp_path):
    f = tmp_path / "p.jsonl"
    f.write_text('{"question": "a", "answer": "two\\n#### 2"}\n\n{"problem": "b", "answer": 27.0}\n{"question": "c", "answer": 0}\n')
    assert skpo.load_problems(str(f)) == [Problem("a", "2"), Problem("b", "27.0"), Problem("c", "0")]
    f.write_text('{"question": "a", "answer": "#### "}')
    with pytest.raises(skpo.UserError, match="line 1: no text or number"):
        skpo.load_problems(str(f))


def test_data_is_held_out_dropped_aloud_and_named(tiny, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"question": "12", "answer": "3"}\n{"question": "%s", "answer": "3"}\n' % ("1" * 30))
    both = f"{tmp_path}/a/test.jsonl, {tmp_path}/b/test.jsonl"
    c = config(eval_data=both, max_prompt_tokens=20)
    problems, tests = skpo.prepare_data(c, *skpo.read_data(c), *tiny)
    assert len(tests) == 2 and all(len(t) == 1 for t in tests.values()) and len(problems) == 2048
    assert problems[0].ids == skpo.prompt_ids(tiny[1], problems[0].question)
    assert capsys.readouterr().out.count("dropped 1 of 2 problems") == 2
    problems, tests = skpo.prepare_data(config(), None, {}, *tiny)
    assert len(problems) == 1792 and len(tests["held-out"]) == 256
    assert not {p.question for p in problems} & {p.question for p in tests["held-out"]}
    assert skpo.prepare_data(config(seed=1), None, {}, *tiny)[1] == tests  # the same for every seed


def test_builtin_problems_are_right():
    for p in skpo.load_problems("arithmetic"):
        assert eval(p.question[8:-1]) == int(p.answer)  # written by us, not by a model
    for p in skpo.load_problems("sums"):
        assert len(p.question) == 6 and sum(map(int, p.question)) % 10 == int(p.answer)
    assert len({p.question for p in skpo.load_problems("sums")}) > 2000


def test_extract_answer():
    assert skpo.extract_answer(r"\boxed{1} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert skpo.extract_answer(r"\boxed{7} then \boxed{8") == "7"
    assert skpo.extract_answer(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert skpo.extract_answer(r"\boxed{\boxed{5}}") == "5"
    for nothing in ("5", "", r"\boxed", r"\boxed{", r"\boxed{}", r"\boxed{ }", r"\boxed{1}\boxed{}"):
        assert not skpo.extract_answer(nothing)


EQUAL = r"""5|5.0;1,000|1000;12{,}345|12345;10\,000|10000;007|7;+5|5;5|−5 - -10;1.5\times 10^{3}|1500;1.5e3|1500;5.|5;\$5$|5
\frac12|\frac{1}{2};\dfrac{1}{2}|0.5;\tfrac12|1/2;2\frac{1}{2}|5/2;2 1/2|2.5;-2\frac12|-2.5;\frac{-3}{4}|-\frac34;0.333333|1/3
50\%|50;50\%|0.5;\$18|18;\$1,234.50|1234.5;45^\circ|45;45^{\circ}|45;45°|45 degrees;5\text{ cm}|5;5\text{ cm}^2|5;12 inches|12
\sqrt{8}|2\sqrt{2};\sqrt2|\sqrt{2};\sqrt[3]{27}|3;(-8)^2|64;2^{10}|1024;\pi/2|\frac{\pi}{2};2\pi|\pi\cdot 2;\infty|infinity;5!|120
-\infty|-∞;x=5|5;f(x)=2x|2x;y=2x+1|1+2x;(1,2)|( 1, 2 );\left(\frac12, 3\right)|(0.5,3);\{1,2,3\}|\{3,2,1\};\{1,2\}|{2,1};1,2|2, 1;[0,1)|[0, 1)
(-\infty, 3]|(-\infty,3];(0,1)\cup(2,3)|(2,3)\cup(0,1);(x+1)^2|x^2+2x+1;(x+1)(x-1)|x^2-1;\frac{1}{2}x|x/2;3\pm\sqrt2|3-\sqrt2, 3+\sqrt2
\text{(C)}|C;(C)|C;\textbf{(C)}|C;\text{Yes}|yes;east|East;\frac{\sqrt{3}}{3}|\frac{1}{\sqrt3};e^{i\pi}|-1;\log_2 8|3
\sin^2 x+\cos^2 x|1;1.41421356|\sqrt{2};x \in [1,2]|[1,2];1{,}000{,}000|10^6;\sqrt{x^2+1}|(x^2+1)^{1/2};10^{-3}|0.001;3 \text{ and } 5|5, 3
\sqrt[3]{-8}|-2;\sin x \cos x|\cos x\sin x;\sin\pi|0;\sin^{-1}(1/2)|\frac{\pi}{6};3:4|3 : 4;x=1, x=2|1, 2;5cm|5;1010_2|1010_{2};2^{-1}|\frac12;|-5|+1|6;27.0|27;\frac{\pi}{4}-\frac12|\frac{\pi-2}{4}
2^{2024}\cdot 2|2^{2025};12,144|12144;1,234\%|1234;x=1,000|1000;(100,200)|(100, 200);\log_{10}100|2;\log_{2}3|\log_2 3;\mathrm{e}^2|e^2
\sin 30^\circ|1/2;\sin 30^\circ\cos 60^{\circ}|\frac14;x \leq 5|x \le 5;\binom{10}{3}|120;\theta = 30^\circ|30;AB = 5|5;\boldsymbol{5}|5"""
DIFFERENT = r"""5|6;0.33|1/3;1.414|\sqrt2;(1,2)|(2,1);(0,1)|[0,1];[0,1)|[0,1];1|-1;x|y;x+1|x+2;C|D;yes|no;\infty|-\infty;\{1,2\}|\{1,3\}
\{1,2\}|\{1,2,3\};\{1,1\}|\{1,2\};\sqrt{x^2}|x;100!|99!;10^{100}|10^{100}+1;2^{100}|2^{100}+1;9^{9^{9^9}}|1;1/0|1/0+1;1000|1,001;(1,2)|12
12|1,2;[1,2]|\{1,2\};\frac{0}{0}|0;i|-i;\sin x|\cos x;50\%|5;x=5|6;99999999!|1;0.1|0.10001;1 000|0;2 3|6;a_1|c_0;2 ab|2;3 xy|3 zw;5 million|5;1234567|1234568.0;\frac13|0.3333
2^{2024}+1|2^{2024}-1;1-\frac{1}{2^{2024}}|1;2^{-2024}|3^{-2024};12144|12, 144;\log_{2}34|\log_{23}4;2\text{ ft }6\text{ in}|26
3\text{ to }5|35;3\text{ million}|3;\sin 30^\circ|\sin 30;2 squared|2;5 factorial|5"""


@pytest.mark.parametrize("table, verdict", [(EQUAL, True), (DIFFERENT, False)])
def test_verdicts(table, verdict):
    for pair in table.replace("\n", ";").split(";"):
        a, b = pair.rsplit("|", 1)
        for given, reference in ((a, b), (b, a)):
            assert skpo.is_correct(f"so it is \\boxed{{{given}}}.", reference) is verdict, (given, reference)
    assert skpo.is_correct(r"\boxed{|-5|}", "5") and skpo.is_correct(r"\boxed{2|x|}", "2 |x|")


def test_hostile_answers_are_wrong_quickly_and_run_nothing(tmp_path):
    target = tmp_path / "pwned"
    hostile = ["9^{9^{9^9}}", "(" * 5000, "1" * 200000, "99999999!", "(x+1)^{99999}", "\0", f"__import__('os').system('touch {target}')",
               f"open('{target}','w')", r"\frac" * 100, "{" * 100 + "}" * 100, "-" * 290, "2^" * 140 + "2", r"\sqrt" * 250 + "2", "|" * 250,
               "1" * 900 + "e999", "1e999999999", "300!!!!", "(300!)^{20}" * 10, "x^{x^{x^x}}", r"\boxed{" * 20000, "{,}" * 300,
               r"\text{" * 150, "a," * 490, r"\{" * 450, r"\exp\exp\exp\exp 100", r"\ln 0", "0^{-1}", r"\sqrt[0]{5}", "e^{e^{e^{e^e}}}",
               "((((9^9)^9)^9)^9)^9", r"\sin " * 140 + "1", " " * 900, "1 " * 450, "((x+1)^{99}+(y+1)^{99})^{99}", r"\binom{300}{150}^{80}" * 20, "(2/3)^{6000}" * 25, "²", "٣", "½"]
    for text in hostile:
        for reference in ("5", text[:-1] + "7"):
            start = time.perf_counter()
            verdict = skpo.is_correct(f"\\boxed{{{text}}}", reference), skpo.is_correct(text, reference)
            assert verdict == (False, False) and time.perf_counter() - start < 1, text[:50]
    assert not target.exists()


def test_random_junk_neither_raises_nor_hangs():
    rng = random.Random(0)
    atoms = ["1", "23", ".", ",", "x", "\\pi", "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "_", "!", "|", "+", "-", "/", "\\%", "=", "\\text{",
             "\\cup", "\\pm", "\\sin", "\\log", " ", "e", "i", "\\infty", "\\{", "\\}", "\\boxed{", "9999", "\\binom", "\\times", "\\\\", "\n", "é", "\0"]
    start = time.perf_counter()
    for _ in range(2000):
        junk = ["".join(rng.choices(atoms, k=rng.randint(1, 30))) for _ in range(2)]
        assert skpo.is_correct(f"\\boxed{{{junk[0]}}}", junk[1]) in (True, False)
    assert time.perf_counter() - start < 30


def test_plain_verdicts_are_fast():
    start = time.perf_counter()
    for i in range(2000):
        assert not skpo.is_correct(f"it is \\boxed{{{i}}}", str(i + 1))
    assert time.perf_counter() - start < 1


# ---- Prompts and sampling -------------------------------------------------------------------------------------------

def test_prompts(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "123")) == "123="  # its chat template
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "123", "none")) == "123"
    tokenizer.chat_template = None
    ids = skpo.prompt_ids(tokenizer, "123")
    assert ids[:3] == tokenizer("123")["input_ids"] and tokenizer.convert_tokens_to_ids("\\boxed{") in ids


PROMPTS = [[1, 2, 3, 4, 5, 10], [7, 10], [3], [5] * 12 + [10]]


def hostile_copy(model, **kwargs):
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0, no_repeat_ngram_size=2, bad_words_ids=[[1]],
        min_new_tokens=5, max_length=9, num_return_sequences=1, pad_token_id=13, eos_token_id=kwargs.get("eos", 13))
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_a_fresh_forwards(tiny, temperature):
    model = hostile_copy(tiny[0], eos=[13, 4])  # pad = EOS, two EOS ids, a hostile generation_config
    torch.manual_seed(0)
    budgets = [40, 3, 70, 1]  # across chunks
    groups = skpo.generate(model, tiny[1], PROMPTS, 5, budgets, temperature)
    assert [len(g) for g in groups] == [5] * 4 and model.generation_config.top_k == 2  # put back
    for prompt, group, budget in zip(PROMPTS, groups, budgets):
        for s in group:
            assert 1 <= len(s.tokens) <= budget and len(s.logprobs) == len(s.tokens)
            assert s.finished == (s.tokens[-1] in (13, 4)) and not {13, 4} & set(s.tokens[:-1])
            assert s.finished or len(s.tokens) == budget
            expected = plain_logprobs(model, prompt, s.tokens, temperature)
            assert torch.allclose(torch.tensor(s.logprobs), expected, atol=1e-4)
    lengths = {len(s.tokens) for s in groups[2]}
    assert len(lengths) > 1, "the test wants ragged rows"


def test_samples_come_from_the_policy_whatever_the_generation_config(tiny):
    model = hostile_copy(tiny[0])
    torch.manual_seed(1)
    samples = skpo.generate(model, tiny[1], [PROMPTS[0]], 20000, 1)[0]
    counts = np.bincount([s.tokens[0] for s in samples], minlength=model.config.vocab_size) / len(samples)
    truth = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).detach().numpy()
    assert np.abs(counts - truth).sum() / 2 < 0.02  # total variation


def test_chunks_do_not_change_the_distribution(tiny, monkeypatch):
    def second_tokens(chunk):
        monkeypatch.setattr(skpo, "CHUNK", chunk)
        torch.manual_seed(chunk)
        samples = skpo.generate(tiny[0], tiny[1], [PROMPTS[0]], 8000, 3)[0]
        return np.bincount([s.tokens[2] for s in samples if len(s.tokens) > 2], minlength=20) / len(samples)
    assert np.abs(second_tokens(1) - second_tokens(32)).sum() / 2 < 0.03


def test_a_small_cache_samples_in_turns(tiny, monkeypatch):
    sizes, inner = [], tiny[0].generate
    monkeypatch.setattr(tiny[0], "generate", lambda ids, **k: sizes.append(len(ids)) or inner(ids, **k))
    groups = skpo.generate(tiny[0], tiny[1], PROMPTS, 3, [4, 5, 6, 7], cache_tokens=60)
    assert [len(g) for g in groups] == [3] * 4 and max(sizes) <= 6
    for prompt, group, budget in zip(PROMPTS, groups, [4, 5, 6, 7]):  # in order, each with its own budget
        for s in group:
            assert s.finished or len(s.tokens) == budget
            assert torch.allclose(torch.tensor(s.logprobs), plain_logprobs(tiny[0], prompt, s.tokens), atol=1e-4)


def test_greedy(tiny):
    sample = skpo.generate(tiny[0], tiny[1], [PROMPTS[0]], 1, 4, temperature=0)[0][0]
    ids = list(PROMPTS[0])
    for token in sample.tokens:
        assert token == tiny[0](torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)


def test_a_model_without_eos_runs_to_its_budget(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    model.generation_config, tokenizer.eos_token = GenerationConfig(), None
    assert [len(s.tokens) for s in skpo.generate(model, tokenizer, [[1, 2]], 3, 50)[0]] == [50] * 3


# ---- Upstream: split, cut, select, skip -----------------------------------------------------------------------------

def test_split_position_is_uniform_between_a_sixth_and_a_half():
    rng = np.random.default_rng(0)
    t = np.array([skpo.split_position(600, rng) for _ in range(4000)])
    assert t.min() >= 100 and t.max() <= 300 and abs(t.mean() - 200) < 4 and abs(t.std() - 200 / math.sqrt(12)) < 3
    assert skpo.split_position(0.5, rng) == 1 and isinstance(skpo.split_position(9, random.Random(0)), int)
    assert {skpo.split_position(100, rng, 0.5, 0.5) for _ in range(5)} == {50}


def test_an_early_segment_is_cut_to_half_without_its_eos():
    ended = Sample(list(range(9)), [-0.1 * i for i in range(9)], True)
    cut = skpo.cut_segment(ended)
    assert cut.tokens == [0, 1, 2, 3] and cut.logprobs == ended.logprobs[:4]
    assert len(skpo.cut_segment(Sample([5, 0], [-1, -1], True)).tokens) == 1
    paused = Sample([1, 2, 3], [-1.0] * 3, False)
    assert skpo.cut_segment(paused) == paused


def test_the_median_segment_is_selected_first_on_a_tie():
    def make(*d):
        return [Sample([0] * 4, [-x + 0.1, -x - 0.1] * 2, False) for x in d]
    assert skpo.select_segment(make(5, 1, 3)) == 2
    assert skpo.select_segment(make(9, 4, 1, 2)) == 1  # 2 and 4 are equally near to 3
    assert skpo.select_segment(make(0.1, 0.7, 0.3, 0.2)) == 2
    assert skpo.select_segment(make(2, 2, 2)) == 0
    for seed in range(50):  # against sorting; G even: the two middle ones tie
        d = np.random.default_rng(seed).normal(size=8).tolist()
        assert skpo.select_segment(make(*d)) == min(d.index(x) for x in sorted(d)[3:5])


def test_skip_prompt_puts_the_segment_first_and_bos_before_it(tiny):
    assert skpo.skip_prompt([7, 8], [1, 2, 3], None) == [7, 8, 1, 2, 3]
    assert skpo.skip_prompt([7, 8], [1, 2, 3], 1) == [1, 7, 8, 2, 3]
    assert skpo.skip_prompt([7, 8], [2, 1, 3], 1) == [7, 8, 2, 1, 3]  # a BOS that does not open q
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.bos_token = "1"  # a chat's turn opener: the tokenizer itself puts no BOS
    assert skpo.prepended_bos(tokenizer) is None


# ---- Log-probs for training -----------------------------------------------------------------------------------------

def some_rows(seed=0, prompts=((1, 2, 3, 10), (4, 10), (5,))):
    rng = np.random.default_rng(seed)
    return [(list(p), rng.integers(0, 14, rng.integers(1, 12)).tolist()) for p in prompts for _ in range(4)]


def test_shared_prefix_logprobs_and_gradients_are_the_plain_ones(tiny):
    model = copy.deepcopy(tiny[0])
    rows = some_rows()
    logprobs, _, _, mask = skpo.response_logprobs(model, [p for p, _ in rows], [o for _, o in rows], temperature=0.8)
    weights = torch.linspace(-1, 1, mask.sum())
    (logprobs[mask] * weights).sum().backward()
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = [plain_logprobs(model, p, o, 0.8) for p, o in rows]
    assert mask.sum(1).tolist() == [len(o) for _, o in rows]
    assert torch.allclose(logprobs[mask], torch.cat(plain), atol=1e-5)
    (torch.cat(plain) * weights).sum().backward()
    for p, g in zip(model.parameters(), shared):
        assert (p.grad - g).norm() <= 1e-4 * p.grad.norm()


def test_the_cached_skip_prompt_gives_the_uncached_logits(tiny):
    prompt = skpo.skip_prompt([3, 1, 4], [1, 5, 9, 10], 1)
    for s in skpo.generate(tiny[0], tiny[1], [prompt, [2, 10]], 3, 6)[0]:
        assert torch.allclose(torch.tensor(s.logprobs), plain_logprobs(tiny[0], prompt, s.tokens), atol=1e-5)


def test_chunked_logprobs_for_any_chunk():
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(8, 30), torch.randn(17, 8, requires_grad=True), torch.randint(30, (17,))
    expected = head(hidden).log_softmax(-1)[torch.arange(17), targets]
    gradient = torch.autograd.grad(expected.square().sum(), hidden)[0]
    for chunk in (1, 5, 17, 100):
        got = skpo.chunked_logprobs(head, hidden, targets, chunk=chunk)[0]
        assert torch.allclose(got, expected, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(got.square().sum(), hidden)[0], gradient, atol=1e-5)


def test_entropy_polarity_is_the_entropys_first_order_change():
    """A policy-gradient step of weight w on the logits of a softmax: the sign, and the size to first order."""
    torch.manual_seed(0)
    logits, targets, eta = 2 * torch.randn(200, 7, dtype=torch.float64), torch.randint(7, (200,)), 1e-4
    p = logits.softmax(1)
    H = -(p * p.log()).sum(1)
    _, entropy, polarity = skpo.chunked_logprobs(torch.nn.Identity(), logits.float(), targets)
    assert torch.allclose(entropy.double(), H, atol=1e-5)
    for w in (1.0, -0.5):
        q = (logits + eta * w * (torch.eye(7)[targets] - p)).softmax(1)  # + eta w grad log p_a
        change = (-(q * q.log()).sum(1) - H) / eta
        assert torch.allclose(w * polarity.double(), change, atol=2e-4)
        assert (torch.sign(w * polarity) == torch.sign(change))[change.abs() > 1e-3].all()


def test_the_update_reports_each_phases_polarity(tiny):
    model, c = copy.deepcopy(tiny[0]), config(micro_tokens=30)
    rows = batch_of_rows(model, tiny[1])
    log, expected = skpo.update(model, torch.optim.SGD(model.parameters(), lr=0), rows, c), {True: 0.0, False: 0.0}
    for r in rows:
        p = model(torch.tensor([r.prompt + r.sample.tokens])).logits[0, len(r.prompt) - 1:-1].softmax(-1)  # [T, V]
        H, a = -(p * p.log()).sum(-1), p[torch.arange(len(p)), r.sample.tokens]
        polarity = (p**2 * (p.log() + H[:, None])).sum(-1) - a * (a.log() + H)
        expected[r.upstream] += 0.5 * r.weight * r.advantage * polarity.sum().item()  # on-policy: the ratio is 1
    assert np.isclose(log["polarity_up"], expected[True], rtol=1e-3) and np.isclose(log["polarity_down"], expected[False], rtol=1e-3)


def test_micro_batches_cover_every_row_once_within_the_limit():
    rng = np.random.default_rng(0)
    prompts = [[i // 8] * (5 + i // 8) for i in range(64)]
    responses = [[0] * int(rng.integers(1, 200)) for _ in range(64)]
    for limit in (1, 300, 1000, 10**6):
        batches = list(skpo.micro_batches(prompts, responses, limit))
        assert sorted(i for b in batches for i in b) == list(range(64))
        for b in batches:
            width, distinct = max(len(responses[i]) for i in b), {tuple(prompts[i]) for i in b}
            assert len(b) == 1 or len(b) * width + len(distinct) * max(map(len, distinct)) <= limit
    assert len(batches) == 1


# ---- Values, trackers, advantages -----------------------------------------------------------------------------------

def test_the_monte_carlo_value_is_the_mean():
    rewards = torch.tensor([[1.0, -1, -1, -1], [1, 1, 1, 1]])
    assert skpo.monte_carlo_value(rewards).tolist() == [-0.5, 1.0]


def test_group_advantages():
    rewards = torch.tensor([[1.0, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [0.1] * 4])
    A = skpo.group_advantages(rewards)
    expected = (np.array([1, -1, -1, -1]) + 0.5) / np.std([1, -1, -1, -1])
    assert np.allclose(A[0], expected) and (A[1:] == 0).all()


def test_upstream_advantages():
    values, baselines = torch.tensor([1.0, 0.0, -0.5]), torch.tensor([0.5, 0.5, 0.0])
    raw = np.array([0.5, -0.5, -0.5])
    assert np.allclose(skpo.upstream_advantages(values, baselines), (raw - raw.mean()) / raw.std(), atol=1e-6)
    assert skpo.upstream_advantages(values, values).tolist() == [0, 0, 0]
    assert skpo.upstream_advantages(torch.tensor([0.3]), torch.tensor([0.0])).tolist() == [0]


def test_tracker():
    t = Tracker(3, 0.5, 0.875, 0.96, 8)
    t.update([1], [0.9], [0.0])  # the first observation replaces the initial value
    assert t.value.tolist() == [0.5, 0.9, 0.5] and t.count.tolist() == [0, 1, 0]
    t.update([1], [0.0], [0.0])  # D = 0: rho clipped to 0.96
    assert np.isclose(t.value[1], 0.9 - 0.9 / 1.96) and np.isclose(t.count[1], 1.96)
    before = t.value[1]
    t.update([1], [1.0], [100.0])  # a large move: rho clipped to 0.875
    assert np.isclose(t.count[1], 0.875 * 1.96 + 1) and np.isclose(t.value[1], before + (1 - before) / (0.875 * 1.96 + 1))
    t.update([0, 1], [0.1, 0.2], [0.0, 1.0])  # between the clips: rho = 2^(-1/8)
    assert np.isclose(t.value[0], 0.1) and np.isclose(t.count[1], 2 ** (-1 / 8) * (0.875 * 1.96 + 1) + 1)


def test_prompts_of_middling_value_are_chosen_most():
    values, rng = np.array([0.0, 0.5, 1.0, 0.5]), np.random.default_rng(0)
    picks = np.bincount(np.concatenate([skpo.choose_prompts(values, 1, rng) for _ in range(4000)]), minlength=4) / 4000
    weight = np.array([0.05, 0.55, 0.05, 0.55])
    assert np.allclose(picks, weight / weight.sum(), atol=0.03)
    assert sorted(skpo.choose_prompts(values, 4, rng)) == [0, 1, 2, 3]


def test_policy_drift(tiny):
    sample = skpo.generate(tiny[0], tiny[1], [[1, 2, 10]], 1, 6)[0][0]
    moved = copy.deepcopy(tiny[0])
    with torch.no_grad():
        moved.model.norm.weight.mul_(1.3)
    now = plain_logprobs(moved, [1, 2, 10], sample.tokens)
    expected = (now - torch.tensor(sample.logprobs)).abs().mean().item()
    drift = skpo.policy_drift(moved, [[5, 10], [1, 2, 10]], [None, sample], config())
    assert drift[0] == 0 and expected > 0.01 and np.isclose(drift[1], expected, atol=1e-5)
    assert skpo.policy_drift(tiny[0], [[1, 2, 10]], [sample], config())[0] < 1e-5


# ---- Losses ---------------------------------------------------------------------------------------------------------

def loss_inputs():
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=rng)
    logprobs = old + 0.6 * torch.randn(4, 5, generator=rng)  # many ratios beyond both clips
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 3, 1, 4)])
    return logprobs, old, torch.tensor([1.5, -0.7, 0.4, -2.0]), mask, torch.tensor([0.1, 0.2, 0.3, 0.05])


@pytest.mark.parametrize("loss_function, high, enough", [(skpo.downstream_loss, 1.28, 3), (skpo.upstream_loss, 1.2, 1)])
def test_losses_and_gradients_against_a_loop(loss_function, high, enough):
    logprobs, old, A, mask, w = loss_inputs()
    total, gradient, beyond = 0.0, np.zeros((4, 5)), 0
    for i, t in mask.nonzero().tolist():
        r, a, v = math.exp(logprobs[i, t] - old[i, t]), A[i].item(), w[i].item()
        clipped = min(max(r, 0.8), high)
        if loss_function is skpo.downstream_loss:  # a clipped token keeps its gradient
            total += -v * clipped * a * logprobs[i, t].item()
            gradient[i, t] = -v * clipped * a
            beyond += clipped != r
        else:  # a token clipped in its advantage's direction loses it
            total += -v * min(r * a, clipped * a)
            dead = a > 0 and r > high or a < 0 and r < 0.8
            gradient[i, t] = 0 if dead else -v * r * a
            beyond += dead
    logprobs.requires_grad_()
    loss = loss_function(logprobs, old, A, mask, w, 0.2, high - 1)
    loss.backward()
    assert beyond > enough and np.isclose(loss.item(), total, atol=1e-6) and np.allclose(logprobs.grad, gradient, atol=1e-6)


# ---- Update ---------------------------------------------------------------------------------------------------------

def batch_of_rows(model, tokenizer, prompts=([1, 2, 3, 10], [4, 5, 10]), G=4):
    """Rows as training_step makes them: two groups of responses and a segment for each."""
    torch.manual_seed(0)
    rng, rows = np.random.default_rng(0), []
    for p, group in zip(prompts, skpo.generate(model, tokenizer, prompts, G, 9)):
        weight = 1 / (sum(len(s.tokens) for s in group) * len(prompts))
        rows += [skpo.Row(p, s, float(rng.normal()), weight, False) for s in group]
        rows[-1] = rows[-1]._replace(advantage=0.0)
        segment = skpo.generate(model, tokenizer, [p], 1, 5)[0][0]
        rows.append(skpo.Row(p, segment, float(rng.normal()), 1 / (len(segment.tokens) * len(prompts)), True))
    return rows


def plain_step(model, rows, c):
    """The gradient of one mini-batch, sequence by sequence."""
    model.zero_grad()
    for row in rows:
        logprobs = plain_logprobs(model, row.prompt, row.sample.tokens)
        ratio = (logprobs - torch.tensor(row.sample.logprobs)).exp()
        if row.upstream:
            loss = -c.w_up * torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage).sum()
        else:
            loss = -c.w_down * (ratio.detach().clamp(0.8, 1.28) * row.advantage * logprobs).sum()
        (row.weight * loss).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("micro_tokens", [1, 40, 10**6])
def test_any_micro_tokens_gives_the_plain_step(tiny, micro_tokens):
    model, tokenizer, c = copy.deepcopy(tiny[0]), tiny[1], config(micro_tokens=micro_tokens, max_grad_norm=1e9)
    rows, grads = batch_of_rows(model, tokenizer), {}
    with torch.no_grad():
        model.model.norm.weight.mul_(1.2)  # off-policy: ratios away from 1, some clipped
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    optimizer.register_step_pre_hook(lambda *_: grads.update(enumerate(p.grad.clone() for p in model.parameters())))
    log = skpo.update(model, optimizer, rows, c)
    expected = plain_step(model, rows, c)
    assert log["clipped"] > 0 and log["tokens"] == sum(len(r.sample.tokens) for r in rows if r.advantage)
    for i, g in enumerate(expected):
        assert (grads[i] - g).norm() <= 1e-4 * g.norm()
    assert np.isclose(log["grad_norm"], math.sqrt(sum(g.square().sum().item() for g in expected)), rtol=1e-4)


def test_the_ratio_is_one_before_the_first_optimiser_step(tiny):
    model = copy.deepcopy(tiny[0])
    log = skpo.update(model, torch.optim.SGD(model.parameters(), lr=0), batch_of_rows(model, tiny[1]), config())
    assert np.isclose(log["ratio"] / log["tokens"], 1, atol=1e-5) and log["clipped"] == 0


def test_the_update_raises_what_was_rewarded(tiny):
    model, tokenizer, c = copy.deepcopy(tiny[0]), tiny[1], config(lr=1e-3)
    rows = [r._replace(advantage=math.copysign(1, r.advantage)) for r in batch_of_rows(model, tokenizer) if r.advantage]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(3):
        skpo.update(model, optimizer, rows, c)
    for upstream in (True, False):
        change = {1: [], -1: []}
        for r in rows:
            if r.upstream == upstream:
                change[r.advantage].append((plain_logprobs(model, r.prompt, r.sample.tokens).sum() - sum(r.sample.logprobs)).item())
        means = {sign: np.mean(v) for sign, v in change.items() if v}
        assert means.get(1, math.inf) > means.get(-1, -math.inf) and means.get(1, 1) > 0


def test_a_small_step_reaches_the_weights_under_bf16(tiny):
    model = copy.deepcopy(tiny[0])
    c, rows = config(dtype="bfloat16"), batch_of_rows(model, tiny[1])
    before = [p.clone() for p in model.parameters()]
    skpo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0), rows, c)
    moved = np.mean([(p != b).float().mean().item() for p, b in zip(model.parameters(), before)])
    assert all(p.dtype == torch.float32 for p in model.parameters()) and moved > 0.9
    with skpo.autocast(c, model.device):
        assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_a_gradient_that_is_not_finite_is_skipped(tiny):
    model = copy.deepcopy(tiny[0])
    rows = [r._replace(advantage=math.inf) for r in batch_of_rows(model, tiny[1])]
    before = [p.clone() for p in model.parameters()]
    log = skpo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rows, config())
    assert log["skipped"] == 1 and all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_no_signal_no_step(tiny):
    model = copy.deepcopy(tiny[0])
    rows = [r._replace(advantage=0.0) for r in batch_of_rows(model, tiny[1])]
    before = [p.clone() for p in model.parameters()]
    log = skpo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rows, config())
    assert log["tokens"] == 0 and all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


# ---- One training step ----------------------------------------------------------------------------------------------

def one_step(warm, monkeypatch, step=1, **kwargs):
    """A training step of 4 prompts: (config, problems, prompts, state, calls of generate, rows of each update, metrics, reading)."""
    model, tokenizer = copy.deepcopy(warm[0]), warm[1]
    c = config(prompts_per_step=4, minibatches=2, **kwargs)
    problems = [replace(p, ids=skpo.prompt_ids(tokenizer, p.question)) for p in skpo.load_problems("sums")[:8]]
    state = skpo.State(Tracker(8, 0.5), Tracker(8, c.init_length), {}, step=step)
    calls, updates = [], []
    generate, update = skpo.generate, skpo.update

    def spy_generate(m, t, p, n, budget, *rest):
        calls.append((p, n, budget, generate(m, t, p, n, budget, *rest)))
        return calls[-1][-1]

    def spy_update(m, o, rows, c):
        updates.append(rows)
        return update(m, o, rows, c)
    with monkeypatch.context() as patch:
        patch.setattr(skpo, "generate", spy_generate)
        patch.setattr(skpo, "update", spy_update)
        row, reading = skpo.training_step(model, tokenizer, torch.optim.AdamW(model.parameters(), lr=1e-4), problems, state, c)
    return c, problems, [p.ids for p in problems], state, calls, updates, row, reading


def reward(tokenizer, tokens, problem):
    return 1.0 if skpo.is_correct(tokenizer.decode(tokens, skip_special_tokens=True), problem.answer) else -1.0


def test_a_training_step_does_what_the_paper_says(warm, monkeypatch):
    c, problems, prompts, state, calls, updates, row, reading = one_step(warm, monkeypatch)
    (q, n1, stops, _), (x, n2, limit, responses) = calls
    assert n1 == n2 == 8 and limit == c.max_new_tokens and all(1 <= t <= 5 for t in stops)
    chosen = [prompts.index(p) for p in q]
    assert len(set(chosen)) == 4
    rewards = torch.tensor([[reward(warm[1], o.tokens, problems[i]) for o in g] for i, g in zip(chosen, responses)])
    assert np.isclose(row["reward"], rewards.mean()) and row["mc_value"] == row["reward"]
    for b, i in enumerate(chosen):
        segment = state.kept[i].tokens
        assert x[b] == segment + q[b] and 1 <= len(segment) <= stops[b]
        assert np.isclose(state.values.value[i], (rewards[b].mean() + 1) / 2) and state.values.count[i] == 1
        assert np.isclose(state.lengths.value[i], np.mean([len(o.tokens) for o in responses[b]]))
    assert [len(u) for u in updates] == [18, 18]  # 2 prompts x 8 responses, and 2 segments
    ups = [r for u in updates for r in u if r.upstream]
    A = rewards.mean(1).numpy()  # the baseline of an unseen prompt is 0
    assert np.allclose([r.advantage for r in ups], (A - A.mean()) / A.std(), atol=1e-5)
    assert [r.prompt for r in ups] == q and [r.prompt for r in updates[0] if not r.upstream] == [x[0]] * 8 + [x[1]] * 8
    for u in updates:  # the weights of a mini-batch: 1 over each phase
        for phase in (True, False):
            assert np.isclose(sum(r.weight * len(r.sample.tokens) for r in u if r.upstream == phase), 1)
    assert reading[0]["prompt"].startswith(reading[0]["segment"]) and len(reading[0]["responses"]) == 8
    assert row["tokens"] == sum(len(s.tokens) for call in calls for g in call[-1] for s in g)


def test_the_ablations_change_what_they_name(warm, monkeypatch):
    c, problems, prompts, state, calls, updates, row, _ = one_step(warm, monkeypatch, ablation="no_skip")
    (q, *_), (x, _, _, responses) = calls
    chosen = [prompts.index(p) for p in q]
    segments = [state.kept[i].tokens for i in chosen]
    assert x == [p + s for p, s in zip(q, segments)]  # onward from q, s; graded and measured together with s
    rewards = [[reward(warm[1], s + o.tokens, problems[i]) for o in g] for i, s, g in zip(chosen, segments, responses)]
    assert np.isclose(row["reward"], np.mean(rewards))
    assert np.isclose(row["response_tokens"], np.mean([len(s + o.tokens) for s, g in zip(segments, responses) for o in g]))

    c, problems, prompts, state, calls, updates, row, _ = one_step(warm, monkeypatch, ablation="no_mc")
    (q, *_), (x, *_), (onward, n, _, own) = calls
    segments = [state.kept[prompts.index(p)].tokens for p in q]
    assert n == 1 and onward == [p + s for p, s in zip(q, segments)] and x == [s + p for p, s in zip(q, segments)]
    values = np.array([reward(warm[1], s + o.tokens, problems[prompts.index(p)]) for p, s, (o,) in zip(q, segments, own)])
    assert row["mc_value"] == values.mean()
    ups = [r.advantage for u in updates for r in u if r.upstream]
    assert np.allclose(ups, (values - values.mean()) / (values.std() or 1), atol=1e-5)

    for step, ends, pick in ((1, 1 / 2, np.argmax), (2, 1 / 6, np.argmin)):
        *_, calls, _, _, _ = one_step(warm, monkeypatch, step=step, ablation="fixed_split", init_length=12)
        assert calls[0][2] == [12 * ends] * 4
        _, _, prompts, state, calls, *_ = one_step(warm, monkeypatch, step=step, ablation="extreme_selection")
        for p, group in zip(calls[0][0], calls[0][3]):
            cut = [skpo.cut_segment(s) for s in group]
            assert state.kept[prompts.index(p)] == cut[pick([-np.mean(s.logprobs) for s in cut])]


def test_grpo_samples_from_the_prompt_alone(quick, tmp_path):
    out = skpo.train(config(tmp_path, algo="grpo", steps=2, eval_every=0, save_every=0))
    rows = rows_of(out)
    assert len(rows) == 2 and rows[0]["segment_tokens"] == 0
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["segment"] == "" and sample["prompt"] == sample["question"] + "="


# ---- Evaluation and analyses ----------------------------------------------------------------------------------------

def test_pass_at_k_is_the_mean_over_all_choices():
    from itertools import combinations
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                expected = np.mean([min(choice) < right for choice in combinations(range(n), k)])
                assert np.isclose(skpo.pass_at_k(n, right, k), expected)


def test_the_majority_is_of_equal_answers():
    assert skpo.same_answers(["0.5", None, "2", r"\frac12", "2.0", None]) == [0, 1, 2, 0, 2, 1]
    assert skpo.majority_vote(["3", r"\frac12", "0.5"]) == 1 and skpo.majority_vote(["3", "4"]) == 0
    assert skpo.majority_vote([None, None, "7"]) == 2 and skpo.majority_vote([None]) is None


def test_evaluation_counts(tiny, monkeypatch):
    problems = [Problem("1", "1", [1]), Problem("2", "2", [2])]
    texts = {1: ["\\boxed{1}", "\\boxed{3}", "\\boxed{1.0}", "none"], 2: ["\\boxed{2}", "\\boxed{5}", "\\boxed{5}", ""]}
    monkeypatch.setattr(skpo, "generate", lambda m, t, prompts, k, *rest: [[Sample([p[0], i], [0, 0], True) for i in range(k)] for p in prompts])
    monkeypatch.setattr(type(tiny[1]), "decode", lambda self, ids, **kwargs: texts[ids[0]][ids[1]])
    result = skpo.evaluate(*tiny, problems, config(eval_samples=4))
    assert result == dict(accuracy=3 / 8, pass_at={1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0}, majority=0.5, samples=4, problems=2)


def test_sign_accuracy():
    rng = np.random.default_rng(0)
    assert skpo.sign_accuracy(np.array([[0, 0, 0, 0, 1, 1, 1, 1.0]] * 50), 8, rng) == (1, 1)  # perfect separation
    single, whole = skpo.sign_accuracy(np.full((4000, 8), 0.5), 999, rng)  # equal prefixes: a coin
    assert abs(single - 0.5) < 0.02 and whole < 0.02
    table = skpo.signs_table(trials=1000)
    by_n = np.array([[v for k, v in row.items() if k != "spread"] for row in table])
    assert (np.diff(by_n, axis=1) > -0.03).all() and (np.diff(by_n, axis=0) > -0.03).all() and by_n[0, 3] < 0.5 < by_n[-1, -1]


def test_shortcut_table_of_a_deterministic_model(warm):
    problems = [Problem(q, "0", skpo.prompt_ids(warm[1], q)) for q in ("123456", "654321", "111111")]
    table = skpo.shortcut_table(*warm, problems, config(temperature=0.0))
    assert [r["condition"] for r in table] == ["unconditional"] + ["continual", "skip"] * 6
    assert np.allclose([r["position"] for r in table[1::2]], np.linspace(1 / 6, 1 / 2, 6), atol=1e-3)
    for r in table:
        assert r["diversity"] == 1 and r["zero_advantage"] == 1 and r["response"] > 1
    whole = table[0]["response"]  # greedy: a continual response is what was left of the full one
    assert all(np.isclose(r["segment"] + r["response"], whole) for r in table if r["condition"] == "continual")
    sampled = skpo.shortcut_table(*warm, problems, config())
    assert max(r["diversity"] for r in sampled) > 1 and min(r["zero_advantage"] for r in sampled) < 1


def test_analyses_from_the_command_line(quick, tmp_path, capsys):
    skpo.main(["--analysis", "signs"])
    assert "spread" in capsys.readouterr().out
    skpo.main(["--analysis", "shortcut", "--prompts_per_step", "8", "--out", str(tmp_path / "a")])
    rows = [json.loads(line) for line in open(tmp_path / "a" / "shortcut.jsonl")]
    assert len(rows) == 13 and "unconditional" in capsys.readouterr().out


# ---- Runs -----------------------------------------------------------------------------------------------------------

SMALL = dict(steps=6, prompts_per_step=8, eval_samples=1, eval_every=3, save_every=1)
TIMINGS = ("seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture(scope="session")
def folder(warm, tmp_path_factory):
    """The warmed-up model as a transformers folder: a run in a process of its own starts at once."""
    path = tmp_path_factory.mktemp("model")
    warm[0].save_pretrained(path)
    warm[1].save_pretrained(path)
    return path


@pytest.fixture
def quick(warm, monkeypatch):
    """Runs in this process take the warmed-up model instead of making it anew."""
    monkeypatch.setattr(skpo, "embedded_model", lambda *a, **k: (copy.deepcopy(warm[0]), warm[1]))
    monkeypatch.setattr(skpo, "STOP", [])


def flags(folder, out, **kwargs):
    """The command line of a small run of the warmed-up model."""
    return [f"--{k}={v}" for k, v in {**skpo.EMBEDDED, **SMALL, "model": folder, "out": out, **kwargs}.items()]


def untimed(rows):
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in rows]


def test_the_default_run_learns(quick, tmp_path, capsys):
    """A shortened default command: accuracy up by a third at least, files complete, the screen as described."""
    out = skpo.train(config(tmp_path, steps=40, eval_every=40))
    scores, rows = rows_of(out, "accuracy"), rows_of(out, "reward")
    scores = [r for r in scores if "data" in r]
    assert scores[0]["step"] == 0 and scores[-1]["step"] == 40
    assert scores[0]["accuracy"] < 0.45 and scores[-1]["accuracy"] > scores[0]["accuracy"] + 0.33
    assert [r["step"] for r in rows] == list(range(1, 41))
    for key in ("mc_value", "zero_advantage", "segment_tokens", "response_tokens", "truncated", "clip_fraction", "ratio", "grad_norm",
                "lr", "tokens", *TIMINGS):
        assert all(math.isfinite(r[key]) for r in rows), key
    assert np.isclose(rows[0]["lr"], 3e-5) and np.isclose(rows[9]["lr"], 3e-4) and rows[-1]["lr"] == 3e-4  # warm-up
    assert len((out / "samples.jsonl").read_text().splitlines()) == 80
    screen = capsys.readouterr().out
    for words in ("held-out 256", "before", "after", "segment", "reward  ", "model/"):
        assert words in screen
    model, tokenizer = skpo.load_model(Config(model=str(out / "model")))  # an ordinary transformers folder
    again = skpo.evaluate(model, tokenizer, skpo.prepare_data(config(), None, {}, model, tokenizer)[1]["held-out"], config())
    assert again["accuracy"] == scores[-1]["accuracy"]


def test_the_same_seed_gives_the_same_numbers(quick, tmp_path):
    a, b, c = (skpo.train(config(tmp_path / str(i), steps=2, eval_every=2, eval_samples=1, seed=s)) for i, s in enumerate((5, 5, 6)))
    assert untimed(rows_of(a)) == untimed(rows_of(b)) != untimed(rows_of(c))


def test_evaluation_alone_changes_nothing(quick, tmp_path):
    out = skpo.train(config(tmp_path, steps=0, eval_samples=1))
    assert [r["step"] for r in rows_of(out)] == [0] and not (out / "model").exists()


def test_a_look_at_a_run_leaves_it_as_it_was(quick, tmp_path):
    out = skpo.train(config(tmp_path, steps=1, prompts_per_step=8, eval_every=0, save_every=1))
    before = (out / "config.json").read_bytes()
    skpo.main(["--resume", "--out", str(out), "--steps", "0", "--eval_samples", "1"])
    assert [(r["step"], r["problems"]) for r in rows_of(out, "data")] == [(1, 256)] and (out / "config.json").read_bytes() == before


def test_a_killed_run_goes_on_as_if_undisturbed(folder, tmp_path):
    """kill -9 at three moments, one of them inside a save; the rows are those of a run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    skpo.main(flags(folder, whole))
    slow = ("import os, sys, time; sys.argv[0] = 'skpo.py'; sys.path.insert(0, sys.argv.pop(1)); import skpo, torch; save = torch.save\n"
            "def slow_save(data, file):\n    save(data, file); print('SAVING', data['step'], flush=True); time.sleep(float(os.environ['PAUSE']))\n"
            "torch.save = slow_save; skpo.main()")
    rng = random.Random(0)
    for attempt, (pause, at) in enumerate([(0.8, 2), (0.4, 3), (0.4, 4)]):
        arguments = flags(folder, killed) if attempt == 0 else ["--resume", "--out", str(killed)]
        process = subprocess.Popen([sys.executable, "-c", slow, str(HERE), *arguments], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "PAUSE": str(pause)})
        for line in process.stdout:
            if line.startswith(f"SAVING {at}"):
                time.sleep(0.2 if attempt == 0 else 0.4 + 0.3 * rng.random())  # the first one falls within the save
                process.kill()
                break
        process.wait()
        assert process.returncode == -9 and (killed / "checkpoint.pt").exists()
        assert attempt or (killed / "checkpoint.tmp").exists()  # caught in the act
    with open(killed / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "torn')  # as a kill within a write would leave it
    skpo.main(["--resume", "--out", str(killed)])
    assert untimed(rows_of(killed)) == untimed(rows_of(whole))
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tmp_path):
    process = subprocess.Popen([sys.executable, "-u", str(HERE / "skpo.py"), *flags(folder, tmp_path / "r", steps=500, save_every=0)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    1  reward"):
            process.send_signal(2)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume --out {tmp_path / 'r'}" in out and "Traceback" not in err
    step = rows_of(tmp_path / "r", "reward")[-1]["step"]
    skpo.main(["--resume", "--out", str(tmp_path / "r"), "--steps", str(step + 1)])
    assert [r["step"] for r in rows_of(tmp_path / "r", "reward")] == list(range(1, step + 2))


def test_a_full_disk_costs_no_older_checkpoint(quick, tmp_path, monkeypatch):
    out = skpo.train(config(tmp_path, steps=1, prompts_per_step=8, eval_every=0, save_every=1))
    before = (out / "checkpoint.pt").read_bytes()

    def full(data, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file: No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(skpo.UserError, match="cannot save a checkpoint.*untouched"):
        skpo.train(replace(config(tmp_path, steps=2, prompts_per_step=8, eval_every=0, save_every=1), resume=True))
    assert (out / "checkpoint.pt").read_bytes() == before and not (out / "checkpoint.tmp").exists()


def test_a_run_without_finite_gradients_stops(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(skpo, "downstream_loss", lambda logprobs, *a: logprobs.sum() * math.nan)
    with pytest.raises(skpo.UserError, match="not finite in 3 steps in a row"):
        skpo.train(config(tmp_path, steps=9, prompts_per_step=8, eval_every=0))
    rows = rows_of(tmp_path / "run")
    assert [r["skipped"] for r in rows] == [4, 4, 4]


@pytest.fixture
def files(tmp_path):
    """Data files, right and wrong, and a folder that holds a run."""
    good = '{"question": "1", "answer": "1"}\n'
    for name, text in dict(good=good * 4, empty="", broken=good + "{oops\n", noanswer='{"question": "1"}\n', list="[1]\n",
                           noquestion='{"answer": "1"}\n', blank=" \n\n").items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "emptymodel").mkdir()
    return tmp_path


@pytest.mark.parametrize("arguments, words", [
    ("--model ./nowhere", "no model folder ./nowhere"), ("--model a/b/c", "no model folder a/b/c"),
    ("--model {}/emptymodel", "cannot load --model"), ("--model x --data {}/none.jsonl", "cannot read"),
    ("--model x --data {}/empty.jsonl", "no problems"), ("--model x --data {}/blank.jsonl", "no problems"),
    ("--model x --data {}/broken.jsonl", "line 2: not JSON"), ("--model x --data {}/noanswer.jsonl", "line 1: no text or number"),
    ("--model x --data {}/noquestion.jsonl", "line 1: no text in"), ("--model x --data {}/list.jsonl", "line 1: not an object"),
    ("--model x --data {}/binary.jsonl", "not text"), ("--model x --data {}", "cannot read"),
    ("--model x --data {}/good.jsonl", "fewer problems than --prompts_per_step 128"),
    ("--data {}/good.jsonl", "name a --model"), ("--model x --eval_data {}/good.jsonl,{}/none.jsonl", "cannot read"),
    ("--group_size 1", "--group_size must be 2 or more"), ("--prompts_per_step 0", "--prompts_per_step must be above 0"),
    ("--lr -1", "--lr must be above 0"), ("--lr nan", "--lr must be above 0"), ("--steps -1", "--steps must be 0 or more"),
    ("--minibatches 5", "does not divide"), ("--split_low 0.6", "--split_low 0.6 <= --split_high 0.5"),
    ("--rho_min 0.99", "--rho_min 0.99"), ("--temperature 0", "greedy"), ("--group_sze 4", "did you mean --group_size?"),
    ("--tempreature=1", "did you mean --temperature?"), ("--zzz 4", "--help lists the flags"), ("--lr fast", "invalid float value"),
    ("--algo ppo", "invalid choice"), ("--device warp", "--device warp"), ("hello", "there is no hello"),
    ("--resume", "needs --out"), ("--resume --out {}/new", "no checkpoint"), ("--resume --out {}/run", "no checkpoint"),
    ("--out {}/run", "already holds a run"), ("--out {}/file", "cannot write"), ("--out {}/file/below", "cannot write"),
])
def test_a_mistake_gets_one_line(files, capsys, arguments, words):
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        skpo.main(arguments.replace("{}", str(files)).split() + ([] if "--out" in arguments or "--resume" in arguments else
                                                                 ["--out", str(files / "fresh")]))
    message = str(stop.value.code)
    assert message.startswith("skpo.py: ") and words in message and "\n" not in message
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before and not (files / "fresh").exists()


def test_the_command_line_exits_without_a_traceback(files):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / "skpo.py"), "--model", "nobody/nothing-at-all-7b", "--out", str(files / "x")],
                          capture_output=True, text=True, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 1 and done.stderr.startswith("skpo.py: no folder nobody/nothing-at-all-7b") and done.stderr.count("\n") == 1
    assert time.perf_counter() - start < 40  # most of it imports
    with pytest.raises(SystemExit) as stop:
        skpo.main(["--help"])
    assert stop.value.code == 0


def test_unsafe_or_broken_model_folders_are_refused(warm, tmp_path):
    folder = tmp_path / "m"
    warm[0].save_pretrained(folder)
    warm[1].save_pretrained(folder)
    assert skpo.load_model(Config(model=str(folder)))[0].dtype == torch.float32
    broken = copy.deepcopy(warm[0])
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    broken.save_pretrained(folder)
    with pytest.raises(skpo.UserError, match="not finite"):
        skpo.load_model(Config(model=str(folder)))
    (folder / "model.safetensors").unlink()
    torch.save(warm[0].state_dict(), folder / "pytorch_model.bin")  # a pickle
    with pytest.raises(skpo.UserError, match="cannot load"):
        skpo.load_model(Config(model=str(folder)))


# ---- Several processes ----------------------------------------------------------------------------------------------

def torchrun(tmp_path, code, *arguments, timeout=120):
    """Runs Python code on two processes; the code finds this folder's modules."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{code}")
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *arguments],
                          capture_output=True, text=True, timeout=timeout)


def test_the_batch_is_dealt_out_evenly(monkeypatch):
    lengths = np.random.default_rng(0).uniform(10, 1000, 32)
    monkeypatch.setattr(skpo, "processes", lambda: 3)
    parts = []
    for r in range(3):
        monkeypatch.setattr(skpo, "rank", lambda: r)
        parts.append(skpo.share(lengths, 2))
    assert sorted(np.concatenate(parts)) == list(range(32))
    loads = [lengths[p].sum() for p in parts]
    assert max(loads) < 1.15 * min(loads) and all(3 < len(p[p < 16]) < 8 for p in parts)  # of every mini-batch
    monkeypatch.setattr(skpo, "everyone", lambda x: [(p, [list(10 * p)]) for p in parts])
    assert skpo.gather(parts[0], None) == [[10 * b for b in range(32)]]


SAME_STEP = """
import copy, torch, skpo, test_skpo
model, tokenizer = skpo.embedded_model(0, steps=0)
rows = test_skpo.batch_of_rows(model, tokenizer)
c = test_skpo.config(micro_tokens=40)
plain = copy.deepcopy(model)
with torch.no_grad():
    plain.model.norm.weight.mul_(1.1); model.model.norm.weight.mul_(1.1)

def steps(model, shares):
    optimizer, grads = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True), []
    whole = lambda g: getattr(g, "full_tensor", lambda: g)().clone()
    optimizer.register_step_pre_hook(lambda *_: grads.extend(whole(p.grad) for p in optimizer.param_groups[0]["params"]))
    norms = [skpo.update(model, optimizer, share, c)["grad_norm"] for share in shares]
    return norms, grads, skpo.get_state_dict(model, optimizer, options=skpo.WHOLE)[0]
expected = steps(plain, [rows, rows[:5], rows])
skpo.join_processes(c)
skpo.shard(model, c)
mine = [rows[:3], rows[3:]][skpo.rank()]  # more passes on one than on the other; then none at all
got = steps(model, [mine, rows[:5] if skpo.rank() else [], mine])
near = lambda a, b: (a - b).norm() <= 1e-5 * max(b.norm(), 1)
assert all(abs(a - b) <= 1e-5 * b for a, b in zip(got[0], expected[0]))
assert len(got[1]) == len(expected[1]) > 60 and all(map(near, got[1], expected[1]))
assert skpo.rank() or all(near(got[2][name], w) for name, w in expected[2].items()) and len(expected[2]) > 20
skpo.each_shard(model, "unshard")
assert torch.allclose(skpo.response_logprobs(model, [[1, 2]], [[3, 4]])[0], skpo.response_logprobs(plain, [[1, 2]], [[3, 4]])[0], atol=1e-4)
"""


FAILURE = """
print("STEPS ARE THE SAME", flush=True)
if skpo.rank():
    skpo.select_segment = lambda *a: 1 / 0
skpo.main(sys.argv[1:])
"""


def test_two_processes_take_the_step_of_one_and_fail_together(folder, tmp_path):
    start = time.perf_counter()
    done = torchrun(tmp_path, SAME_STEP + FAILURE, *flags(folder, tmp_path / "run", steps=500, eval_every=0))
    assert "STEPS ARE THE SAME" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr and time.perf_counter() - start < 90


def test_two_processes_take_over_from_one_learn_and_hand_back(folder, quick, tmp_path):
    out = tmp_path / "run"
    skpo.main(flags(folder, out, steps=1, prompts_per_step=32, eval_samples=4, eval_every=30))
    done = torchrun(tmp_path, "import skpo\nskpo.main()", "--resume", "--out", str(out), "--steps", "30", "--save_every", "30")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = [r["accuracy"] for r in rows_of(out, "data")]
    assert len(scores) == 3 and scores[2] > scores[0] + 0.25 and done.stdout.count("step   30") == 2
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    model = skpo.load_model(Config(model=str(out / "model")))[0]
    for name, w in model.state_dict().items():  # both files hold the whole model
        assert torch.equal(w, saved["model"][name])
    skpo.main(["--resume", "--out", str(out), "--steps", "31", "--eval_every", "0"])
    rows = rows_of(out, "reward")
    assert [r["step"] for r in rows] == list(range(1, 32)) and rows[30]["reward"] > rows[0]["reward"] + 0.2
