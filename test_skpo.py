# SPDX-License-Identifier: MIT
"""Tests of skpo.py against independent arithmetic and plain forward passes. Small models, a CPU."""
import contextlib, copy, json, math, os, random, re, shutil, subprocess, sys, timeit
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # threads would wait for one another
import numpy as np, pytest, skpo, torch, transformers
from skpo import Config, Problem, Sample, Tracker
HERE = Path(__file__).parent
@pytest.fixture(scope="session", autouse=True)
def tiny():  # a random model of two layers, float32, and the embedded tokenizer
    skpo.join_processes()
    return skpo.embedded_model(0, steps=0)
@pytest.fixture(scope="session")
def warm():  # the embedded model after its supervised warm-up
    return skpo.embedded_model(0)
@pytest.fixture(scope="session")
def folder(warm, tmp_path_factory):  # the same as a transformers folder
    path = tmp_path_factory.mktemp("model")
    return [part.save_pretrained(path) for part in warm] and path
@pytest.fixture
def quick(warm, monkeypatch):  # runs in this process take that model
    monkeypatch.setattr(skpo, "embedded_model", lambda *_, **__: (copy.deepcopy(warm[0]), warm[1]))
def plain_logprobs(model, prompt, response, temperature=1.0):  # uncached, unpadded: [T, V], [T]
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    table = (logits / temperature).log_softmax(-1)
    return table, table[torch.arange(len(response)), response]
def near(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm() + 1e-6
def config(**kwargs):
    return Config(**{**skpo.EMBEDDED, **kwargs})
def rows_of(out, key):  # a run's rows that have the key, without what differs from run to run
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows if key in row]

# ---- Config, problems, prompts
def test_defaults_are_the_papers():
    papers = dict(
        lr=1e-6, warmup_steps=10, weight_decay=0.1, max_grad_norm=1, steps=500, group_size=8, tau=8,
        prompts_per_step=128, minibatches=4, max_prompt_tokens=1024, max_new_tokens=3072,
        temperature=1, clip_low=0.2, clip_high=0.28, w_up=0.5, w_down=0.5, split_low=1 / 6,
        split_high=1 / 2, init_length=1024, rho_min=0.875, rho_max=0.96, explore_eps=0.05)
    assert replace(Config(), **papers) == Config()

@pytest.mark.parametrize("gpu", [True, False])
def test_plans_are_for_what_no_flag_sets(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    small = {} if gpu else skpo.SMALL
    assert skpo.parse_config([]) == config()
    assert skpo.parse_config(["--model=x", "--lr=5"]) == Config("x", **{**small, "lr": 5.0})

def test_the_comments_in_config_are_the_help(capsys):
    with pytest.raises(SystemExit):
        skpo.main(["--help"])
    shown = "".join(capsys.readouterr().out.split("options:")[1].split())
    for name in vars(Config()):
        comment = re.search(rf"\n    {name}: [^#]*  # (.*)", (HERE / "skpo.py").read_text())[1]
        assert re.search(rf"--{name}.{{,200}}{re.escape(comment.replace(' ', ''))}", shown), name

def test_the_scripts_own_dependencies_are_the_requirements():
    inline = re.search(r"\n# dependencies = (\[.*\])", (HERE / "skpo.py").read_text())[1]
    required = (HERE / "requirements.txt").read_text().split()
    assert sorted(json.loads(inline) + ["pytest"]) == sorted(required)

def test_problem_files(tmp_path):
    f = tmp_path / "p.jsonl"
    good = '{"question": "a", "answer": "two\\n#### 2"}\n\n{"problem": "b", "answer": 27.0}\n'
    f.write_text(good)
    assert skpo.load_problems(f) == [Problem("a", "2"), Problem("b", "27.0")]
    for bad in ('{"question": "a", "answer": "#### "}', '{"question": "a", "answer": true}', "\0",
                '{"question": 3, "answer": 1}', "[" * 9**5, '{"question": "1"}', '{"answer": "1"}'):
        f.write_text(good + bad)
        with pytest.raises(skpo.UserError, match="line 4: not a JSON object"):
            skpo.load_problems(f)

def test_builtin_problems_are_right():
    for p in skpo.load_problems("arithmetic"):
        assert eval(p.question[8:-1]) == int(p.answer)  # written by us, not by a model
    for p in skpo.load_problems("sums"):
        assert len(p.question) == 6 and sum(map(int, p.question)) % 10 == int(p.answer)

def test_the_held_out_split_is_the_same_whatever_the_flags(tiny):
    def split(**kwargs):
        train, tests = skpo.load_data(config(**kwargs), *tiny)
        return [p.question for p in train], [p.question for p in tests["held-out"]]
    train, test = split()
    assert len(set(train + test)) == 2048 and (len(train), len(test)) == (1792, 256)
    assert split(seed=1, algo="grpo", max_prompt_tokens=9, eval_problems=9) == (train, test[:9])

def test_dropped_problems_are_said_aloud(tiny, tmp_path, capsys):
    rows = [json.dumps(dict(question=q, answer=r"\boxed{3}")) for q in ("12", "1" * 30)]
    (tmp_path / "a").write_text("\n".join(rows))
    _, tests = skpo.load_data(config(eval_data=f"{tmp_path}/a", max_prompt_tokens=20), *tiny)
    assert [(p.question, p.answer) for p in tests[f"{tmp_path}/a"]] == [("12", "3")]
    assert f"{tmp_path}/a: 1 of 2 problems have prompts of 1 to 20" in capsys.readouterr().out

# ---- Rewards
def test_extract_answer():
    for text, answer in ((r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed {5}", "5"),
                         (r"\boxed{7} then \boxed{8", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
                         (r"\boxed{\boxed{5}}", "5"), (r"\boxed{1}\boxed{}", None), ("5", None),
                         (r"\boxed", None), (r"\boxed{", None), (r"\boxed{ }", None)):
        assert skpo.extract_answer(text) == answer

EQUAL = r"""1,000|1000;12{,}345|12345;10\,000|10000;5|5 - -10 - 10;1.5\times 10^{3}|1500;\$5$|5
\frac12|\frac{1}{2};2\frac{1}{2}|5/2;2 1/2|2.5;\frac{-3}{4}|-\frac34;50\%|50;\$1,234.50|1234.5
45°|45 degrees;\sqrt[3]{27}|3;2^{10}|1024;\pi/2|\frac{\pi}{2};\infty|infinity;f(x)=2x|2x
(1,2)|( 1, 2 );\left(\frac12, 3\right)|(0.5,3);\{1,2,3\}|\{3,2,1\};1,2|2, 1;\{1,2\}|2,1
(0,1)\cup(2,3)|(2,3)\cup(0,1);(x+1)^2|x^2+2x+1;\frac{1}{2}x|x/2;\frac{\sqrt{3}}{3}|\frac{1}{\sqrt3}
x \in [1,2]|[1,2];\sqrt[3]{-8}|-2;\frac{\pi}{4}-\frac12|\frac{\pi-2}{4};1,234\%|1234;x=1,000|1000
\theta = 30^\circ|30;\boldsymbol{5}|5;(-∞,3]|(-\infty, 3];x=05|5;1°,2°,3°,4°|4,3,2,1
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix};2**3|8
x=2 \text{ or } x=3|3,2;a_{1}+a_2|a_2+a_1;3\sqrt{2}i|3i\sqrt{2};\$5, \$6|5,6;50^{\circ}\text{C}|50
\left\{1,2\right\}|\{1, 2\};\text{A}|A;4\pi\text{ cm}^3|4\pi;\frac{5!}{2!3!}|10;x \leq 5|x\le 5
\sqrt{2}\frac12|\frac{\sqrt2}{2};\frac12\frac34|\frac38;x\neq3|x \ne 3;1,\ldots|1,\dots
\log_{2} 3|\log_2 3;2\sqrt[3]{-8}|-4;\sqrt[3]{-1+9}|2;\sqrt[5]{-x}y|-y\sqrt[5]{x}"""
DIFFERENT = r"""5|6;0.33|1/3;0.333333|1/3;1.414|\sqrt2;(1,2)|(2,1);(0,1)|[0,1];[0,1)|[0,1];1|-1;x|y
x+1|x+2;C|D;yes|no;\infty|-\infty;\{1,2\}|\{1,3\};\{1,2\}|\{1,2,3\};\{1,1\}|\{1,2\};\sqrt{x^2}|x
100!|99!;10^{100}|10^{100}+1;2^{100}|2^{100}+1;9^{9^{9^9}}|1;1/0|1/0+1;1000|1,001;(1,2)|12;12|1,2
[1,2]|\{1,2\};\frac{0}{0}|0;i|-i;\sin x|\cos x;50\%|5;50\%|0.5;x=5|6;99999999!|1;0.1|0.10001;1 000|0
2 3|6;a_1|c_0;\langle1,2\rangle|\langle2,1\rangle;(-1)^n|(-1)^{n+1};1,2,...|1,2;2 ab|2;3 xy|3 zw
5 million|5;1234567|1234568.0;\frac13|0.3333;2^{2024}+1|2^{2024}-1;1-\frac{1}{2^{2024}}|1
2^{-2024}|3^{-2024};12144|12, 144;\log_{2}34|\log_{23}4;2\text{ ft }6\text{ in}|26;3\text{ to }5|35
3\text{ million}|3;\sin 30^\circ|\sin 30;2 squared|2;5 factorial|5;1450000.5|1450000;x=1,y=2|x=2,y=1
2 dozens|2;2\text{ dozens}|2;\log 2|\ln 2;3!!|720;\$1\$2|12;5%3|53;5^\circ3|53;no|on;x+y=5|5;xy=5|5
-(1,2)|();-(1,2)|(1,2);2(1,2)|(1,2,1,2);10^{100}+10^{-100}|10^{100};|x|/x|1-i;1e-999|0;x<5|x<6
x\le5|x<5;3:4|3/4;3 pm|3 am;3\text{ pm}|3\text{ am};12\text{ mod }5|12
(0,1)\cup(2,3),(4,5)|(0,1),(2,3)\cup(4,5);2 10^{100}|210^{100};1 000!|1000!
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{pmatrix}1&2\\3&5\end{pmatrix};2^{3}5|2^{35}
(1,2,3,4)|\begin{pmatrix}1&2\\3&4\end{pmatrix};1 1 1/2|3/2;2g|2;5m|5;3\mathrm{i}|3;\{1,2\},3|1,2,3
\frac123|\frac{1}{23};-2\frac{1}{2}|-1.5;-2^2|4;2^{3^2}|64;1.5.5|7.5;(1,234)|1234;x=1,2|x=1,3
|x-1||x-1;2^3|8.5;\sqrt[3]{x}|\sqrt{x};1,000|1;\binom{5}{2}|\frac{5}{2};a_{12}|a_1;1_2|12;2!3|23
\text{no solution}|no;\infty+1|\infty;1010_2|1010;0.\overline{3}|0.3;x_{12}|x_{212};12 ,144|12144"""
@pytest.mark.parametrize("table, verdict", [(EQUAL, True), (DIFFERENT, False)])
def test_verdicts(table, verdict):
    for pair in table.replace("\n", ";").split(";"):
        a, b = pair.rsplit("|", 1)
        for given, answer in ((a, b), (b, a)):
            assert skpo.is_correct(f"so \\boxed{{{given}}}.", answer) is verdict, (given, answer)

HOSTILE = [
    "9^{9^{9^9}}", "(" * 5000, "1" * 200000, "99999999!", "(x+1)^{99999}", "\0", "-" * 290, "²",
    "{" * 100 + "}" * 100, "2^" * 140 + "2", r"\sqrt" * 250 + "2", "1" * 900 + "e999", "300!!!!",
    "(300!)^{20}" * 10, "x^{x^{x^x}}", r"\boxed{" * 20000, "{,}" * 300, r"\text{" * 49, "a," * 490,
    r"\{" * 450, "0^{-1}", r"\sqrt[0]{5}", r"\frac" * 100, "((((9^9)^9)^9)^9)^9", " " * 900, "٣",
    "1 " * 450, "((x+1)^{99}+(y+1)^{99})^{99}", "(1+e)^" * 49 + "7", "(e+" * 74 + "7" + ")" * 74,
    "(1+e)^{2/3}(e-3)" * 18, "((e+1)^{.3}-3)^" * 19 + "7", "," * 299, "x=" * 149 + "7", "69!" * 99,
    "(x,y," * 59 + "7", "1,000" * 59, "x_" * 150, "1{,}" * 74, "5 " * 149, "5\\text{" * 40, "½",
    r"\{x," * 74, "((-1)^{10^{99}+.5})^" * 14 + "7", " m" * 149, r"\sqrt[e]" * 37 + "7",
    "m\\angle " * 37, "5 square " * 33, "\\text{a" * 49, "\\sin" + "°" * 295, "1e999999999"]
JUNK = r"1 23 . , x \frac \sqrt { } ( ) [ ] ^ _ ! | + - / \% = \text{ \cup e i \{ 9999 \times"

def seconds(function, *arguments):
    return timeit.timeit(lambda: function(*arguments), number=1)

def test_hostile_answers_are_wrong_quickly_and_run_nothing(tmp_path):
    code = [f"__import__('os').system('touch {tmp_path}/x')", f"open('{tmp_path}/x','w')"]
    rng, atoms = random.Random(0), [*JUNK.split(), " ", "\n", "\0", "\ud800"]
    junk = ["".join(rng.choices(atoms, k=rng.randint(3, 30))) for _ in range(1000)]
    for text in HOSTILE + code + junk:
        assert not skpo.is_correct(f"\\boxed{{{text}}}", "77") and not skpo.is_correct(text, "77")
        for answer in ("5", text[:-1] + "7", text):
            assert seconds(skpo.is_correct, f"\\boxed{{{text}}}", answer) < 1, text[:50]
    for text in (r"\boxed{" * 25000 + "}" * 25000, r"\boxed" + " " * 200000, "\\" * 200001):
        assert seconds(skpo.extract_answer, text) < 1
    assert not (tmp_path / "x").exists()

def test_plain_verdicts_are_fast():
    def judge():
        for i in range(250):
            for answer in (i + 1, -i - 1, i + 0.5, f"\\text{{a}} {i}"):
                assert not skpo.is_correct(f"it is \\boxed{{{i}}}", answer)
    assert min(seconds(judge) for _ in range(3)) < 1

# ---- Sampling, upstream, log-probs
PROMPTS = [[1, 2, 3, 4, 5, 10], [7, 10], [3], [5] * 12 + [10]]
LATE = getattr(transformers.generation.utils, "DeferredStopCheck", None)
def hostile_copy(tiny, eos=13):  # pad = EOS, and a generation_config that is not the policy's
    model = copy.deepcopy(tiny[0])
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0, max_length=9,
        no_repeat_ngram_size=2, bad_words_ids=[[1]], min_new_tokens=5, num_return_sequences=1,
        pad_token_id=13, eos_token_id=eos)
    return model
def check_samples(model, tokenizer, n, budgets, eos={13}, temperature=1.0):
    torch.manual_seed(0)
    groups = skpo.generate(model, tokenizer, PROMPTS, n, budgets, temperature)
    assert [len(group) for group in groups] == [n] * 4
    for prompt, group, budget in zip(PROMPTS, groups, budgets):
        for s in group:
            assert s.prompt == prompt and (1 <= len(s.tokens) <= budget if s.finished else
                                           len(s.tokens) == budget)
            assert s.finished == (s.tokens[-1] in eos) and not eos & {*s.tokens[:-1]}
            _, expected = plain_logprobs(model, prompt, s.tokens, temperature)
            assert torch.allclose(torch.tensor(s.logprobs), expected, atol=1e-4)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_a_fresh_forwards(tiny, temperature):
    model = hostile_copy(tiny, eos=[13, 4])
    check_samples(model, tiny[1], 5, [40, 3, 70, 1], {13, 4}, temperature)
    pytest.raises(IndexError, skpo.generate, model, tiny[1], [[99]], 1, 2)  # no such token
    assert model.generation_config.top_k == 2  # put back, both times

@pytest.mark.skipif(LATE is None, reason="this transformers stops in time")
def test_logprobs_stay_aligned_if_transformers_stops_a_step_late(tiny, monkeypatch):
    monkeypatch.setattr(LATE, "is_supported", MagicMock(return_value=True))
    monkeypatch.setattr(torch, "Event", MagicMock())  # a CPU has none
    check_samples(*tiny, 3, [40, 3, 70, 1])
    assert LATE.is_supported.called

@pytest.mark.parametrize("chunk", [1, 32])
def test_samples_come_from_the_policy(tiny, monkeypatch, chunk):
    monkeypatch.setattr(skpo, "CHUNK", chunk)
    torch.manual_seed(1)
    share = np.zeros((15, 15))
    for s in skpo.generate(hostile_copy(tiny), tiny[1], PROMPTS[:1], 20000, 2)[0]:
        share[s.tokens[0], s.tokens[-1]] += 1 / 20000  # an EOS at once: (13, 13)
    p = tiny[0](torch.tensor([PROMPTS[0] + [a] for a in range(15)])).logits.softmax(-1).detach()
    truth = (p[0, -2, :, None] * p[:, -1]).numpy()  # [V, V]
    truth[13] = p[0, -2, 13].item() * (np.arange(15) == 13)
    assert np.abs(share - truth).sum() / 2 < 0.05  # total variation

def test_prompts_take_turns_where_the_memory_is_short(tiny, monkeypatch):
    monkeypatch.setattr(skpo, "rows_that_fit", lambda model, length: 5)  # no whole prompts
    monkeypatch.setattr(tiny[0], "generate", spy := MagicMock(side_effect=tiny[0].generate))
    check_samples(*tiny, 3, [4, 5, 6, 7])
    assert max(len(call.args[0]) for call in spy.call_args_list) == 5

def test_greedy_and_without_eos(tiny):
    model, tokenizer = copy.deepcopy(tiny)
    model.generation_config = transformers.GenerationConfig()
    tokenizer.eos_token = None
    assert skpo.generate(*tiny, [], 3, []) == []
    sample = skpo.generate(model, tokenizer, PROMPTS[:1], 2, 50, temperature=0)[0][1]
    assert len(sample.tokens) == 50 and not sample.finished
    assert plain_logprobs(model, PROMPTS[0], sample.tokens)[0].argmax(-1).tolist() == sample.tokens

def test_the_split_is_uniform_between_a_sixth_and_a_half():
    t = np.array([skpo.split_position(600, random) for _ in range(4000)])
    assert t.min() >= 100 and t.max() <= 300 and abs(t.mean() - 200) < 5 and abs(t.std() - 57.7) < 4
    assert skpo.split_position(0.5, np.random.default_rng(0)) == 1

def test_an_early_segment_is_cut_to_half_without_its_eos():
    for length, half in ((9, 4), (8, 3), (3, 1), (2, 1), (1, 1)):
        ended = Sample(list(range(length)), [-0.1 * i for i in range(length)], True, [7])
        expected = Sample(ended.tokens[:half], ended.logprobs[:half], False, [7], ended.tokens)
        assert skpo.cut_segment(ended) == expected
        assert skpo.cut_segment(replace(ended, finished=False)).tokens == ended.tokens

def test_the_segment_of_median_surprise_is_selected_first_on_a_tie():
    def select(*d, target=np.median):  # of different lengths, for the sum is not the mean
        return skpo.select_segment([[0.1 - x, -0.1 - x] * (i + 1) for i, x in enumerate(d)], target)
    assert select(5, 1, 3) == 2 and select(9, 4, 1, 2) == 1  # 2 and 4 are equally near to 3
    assert select(5, 1, 3, target=np.max) == 0 and select(5, 1, 3, target=np.min) == 1
    for seed in range(50):  # against sorting; of 8, the two in the middle tie
        d = np.random.default_rng(seed).normal(size=8).tolist()
        assert select(*d) == min(d.index(x) for x in sorted(d)[3:5])

def test_the_skip_prompt_puts_the_segment_first_and_bos_before_it():
    assert skpo.skip_prompt([7, 8], [2, 1, 3], 1) == [7, 8, 2, 1, 3]  # BOS does not open q
    segments = [Sample([7, 8], [], False, [1, 2])]
    for opening, x in (([1], [1, 7, 8, 2]), ([], [7, 8, 1, 2])):  # []: only a chat template puts it
        tokenizer = MagicMock(bos_token_id=1, return_value=dict(input_ids=opening))
        assert skpo.skip_responses(lambda *a: a, segments, tokenizer, config()) == ([x], 8)

def test_shared_prefix_logprobs_and_gradients_are_the_plain_ones(tiny):
    model, weights = tiny[0], list(tiny[0].parameters())
    prompts = [p for p in ([1, 2, 3, 10], [4, 10], [5]) for _ in range(4)]
    responses = [[n, *range(n)][:n] for n in (5, 1, 11, 0, 2, 9, 3, 3, 7, 1, 4, 8)]
    logprobs, mask = skpo.response_logprobs(model, prompts, responses, 0.8)
    plain = torch.cat([plain_logprobs(model, *row, 0.8)[1] for row in zip(prompts, responses)])
    assert mask.sum(1).tolist() == [len(o) for o in responses]
    assert near(logprobs[mask], plain) and not logprobs[~mask].any()
    sums = [(x * torch.linspace(-1, 1, len(plain))).sum() for x in (logprobs[mask], plain)]
    assert all(map(near, *(torch.autograd.grad(x, weights) for x in sums)))
    assert not skpo.response_logprobs(model, [[5]], [[]])[1].any()
    alone = skpo.response_logprobs(model, [[5]], [[1, 2]])[0][0]
    assert near(alone, plain_logprobs(model, [5], [1, 2])[1])

def test_a_cache_that_stays_empty_is_an_error(tiny):
    model = copy.deepcopy(tiny[0]).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache stayed empty"):
        skpo.response_logprobs(model, [[1, 2]], [[3]])

@pytest.mark.parametrize("chunk", [1, 5, 17, 100])
def test_chunked_logprobs_for_any_chunk(chunk):
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(8, 30), torch.randn(17, 8), torch.randint(30, (17,))
    p = (head(hidden.requires_grad_()) / 0.7).softmax(-1)
    expected = p.log()[torch.arange(17), targets]
    both = skpo.chunked_logprobs(head, hidden, targets, 0.7, chunk), expected
    assert near(*both) and near(*(torch.autograd.grad(x.square().sum(), hidden)[0] for x in both))

def test_micro_batches_cover_every_row_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 200, 64).tolist()
    samples = [Sample([0] * n, [], True, [i // 8] * (5 + i // 8)) for i, n in enumerate(lengths)]
    for limit in (1, 300, 1000, 10**6):
        passes = skpo.micro_batches(samples, limit)
        assert sorted(sum(passes, [])) == list(range(64))
        for rows in passes:
            prompts = {tuple(samples[i].prompt) for i in rows}
            tokens = len(rows) * max(len(samples[i].tokens) for i in rows)
            assert len(rows) == 1 or tokens + len(prompts) * max(map(len, prompts)) <= limit
    assert len(passes) == 1 and not skpo.micro_batches([], 100)

# ---- Values, trackers, advantages, losses
def test_tracker():
    t = Tracker(3, 0.5)
    x, N = 0.5, 0.0  # rho N = 0: the first observation replaces the initial value
    for D, rho in ((0, 0.96), (0, 0.96), (100, 0.875), (1, 2 ** (-1 / 8))):
        t.update([0, 1], [0.1, 0.3 - N], [0.0, D])
        x, N = x + (0.3 - N - x) / (rho * N + 1), rho * N + 1
        assert np.isclose(t.value[1], x) and np.isclose(t.count[1], N)
    assert np.isclose(t.value[0], 0.1) and (t.value[2], t.count[2]) == (0.5, 0)

def test_prompts_of_middling_value_are_chosen_most():
    values, rng = np.array([-1.0, 0.0, 1.0, 0.6]), np.random.default_rng(0)
    picks = np.ravel([skpo.choose_prompts(values, 1, rng) for _ in range(8000)])
    weight = np.array([0, 0.5, 0, 0.4]) + 0.05  # v of 0.6 is 0.8: sqrt(0.8 * 0.2) = 0.4
    assert np.allclose(np.bincount(picks, minlength=4) / 8000, weight / weight.sum(), atol=0.02)
    assert sorted(skpo.choose_prompts(values, 4, rng)) == [0, 1, 2, 3]

def test_values_and_advantages():
    rewards = torch.tensor([[1, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    for R in (rewards, rewards.float(), rewards.numpy()):
        assert skpo.monte_carlo_value(R).tolist() == [-0.5, 1, -1]
        A = np.array([[1.5, -0.5, -0.5, -0.5], [0] * 4, [0] * 4]) / math.sqrt(0.75)
        assert np.allclose(skpo.group_advantages(R), A)
    assert not skpo.group_advantages([[0.1] * 7]).any()  # not what rounding leaves of the mean
    A = skpo.upstream_advantages([1.0, 0.0, -0.5], [0.5, 0.5, 0.0])  # raw: 0.5, -0.5, -0.5
    assert np.allclose(A, np.array([2, -1, -1]) / math.sqrt(2))
    assert not skpo.upstream_advantages([0.3, 0.3], [0.2, 0.2]).any()

@pytest.mark.parametrize("name, high", [("downstream_loss", 1.28), ("upstream_loss", 1.2)])
def test_losses_and_gradients_against_a_loop(name, high):
    rng = np.random.default_rng(0)
    old, A, weights = -rng.random((6, 9)), rng.normal(size=6), rng.random((6, 9)) + 0.1
    logprobs = old + 0.6 * rng.normal(size=(6, 9))
    weights[:2, 5:] = 0  # padding
    expected, gradient = 0.0, np.zeros((6, 9))
    beyond = np.zeros(4)  # low, high; those whose gradient eq. 6 stops, low, high
    for i, t in np.argwhere(weights):
        r, a, w = math.exp(logprobs[i, t] - old[i, t]), A[i], weights[i, t]
        clipped = min(max(r, 0.8), high)
        beyond += r < 0.8, r > high, r < 0.8 and a < 0, r > high and a > 0
        if name == "downstream_loss":  # a clipped token keeps its gradient
            expected -= w * clipped * a * logprobs[i, t]
            gradient[i, t] = -w * clipped * a
        else:  # a token clipped in its advantage's direction loses it
            expected -= w * min(r * a, clipped * a)
            gradient[i, t] = 0 if r * a > clipped * a else -w * r * a
    now, then, A, weights, gradient = map(torch.tensor, (logprobs, old, A, weights, gradient))
    loss = getattr(skpo, name)(now.requires_grad_(), then, A, weights)  # its defaults: the paper's
    loss.backward()
    assert beyond.min() >= 3 and np.isclose(loss.item(), expected) and near(now.grad, gradient)

# ---- The update
def batch_of(model, tokenizer):  # as training_step's: of 2 prompts, each 4 responses, a segment
    torch.manual_seed(0)
    samples = []
    for group in skpo.generate(model, tokenizer, [[1, 2, 3, 10], [4, 5, 10]], 4, 9):
        weight = 1 / (2 * sum(len(s.tokens) for s in group))
        segment = replace(group[1], upstream=True, weight=1 / (2 * len(group[1].tokens)))
        samples += [replace(s, weight=weight) for s in group] + [segment]
    for s, advantage in zip(samples, np.random.default_rng(0).normal(size=len(samples)).tolist()):
        s.advantage = advantage
    samples[0].advantage = 0.0
    return samples
def plain_gradient(model, samples, c):  # and sums: tokens, ratios, clipped ones
    loss, sums = 0.0, np.zeros(3)
    for s in samples:
        _, logprobs = plain_logprobs(model, s.prompt, s.tokens)
        ratio, A = (logprobs - torch.tensor(s.logprobs)).exp(), s.advantage
        clipped = ratio.clamp(0.8, 1.2 if s.upstream else 1.28)
        up = torch.minimum(ratio * A, clipped * A).sum()
        down = (clipped.detach() * A * logprobs).sum()
        loss -= s.weight * (c.w_up * up if s.upstream else c.w_down * down)
        sums += [len(ratio), ratio.sum().item(), (ratio != clipped).sum().item()]
    return torch.autograd.grad(loss, list(model.parameters())), sums
def keep_gradients(optimizer):  # a list that fills with the whole gradients of each step
    kept = []
    optimizer.register_step_pre_hook(lambda *_: kept.append([
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for p in optimizer.param_groups[0]["params"]]))
    return kept
def off_policy(tiny):  # a copy of the model that has moved from where it sampled, and the samples
    model = copy.deepcopy(tiny[0])
    model.model.norm.weight.data *= 1.3
    return model, batch_of(*tiny)

@pytest.mark.parametrize("micro_tokens, limit", [(1, 1e9), (40, 1e9), (10**6, 1e9), (99, 0.01)])
def test_any_micro_tokens_gives_the_plain_step(tiny, micro_tokens, limit):
    model, samples = off_policy(tiny)
    c = config(micro_tokens=micro_tokens, max_grad_norm=limit, w_up=0.7, w_down=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    kept = keep_gradients(optimizer)
    log = skpo.update(model, optimizer, samples, c)
    expected, sums = plain_gradient(model, samples[1:], c)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert all(near(g, e * min(1, limit / norm)) for g, e in zip(kept[0], expected))
    keys = ("tokens", "ratio", "clip_fraction", "grad_norm")
    assert np.allclose([log[key] for key in keys], [*sums, norm], rtol=1e-4) and norm > 0.02

def test_what_has_no_weight_or_advantage_is_left_out(tiny):
    model, samples = copy.deepcopy(tiny[0]), batch_of(*tiny)
    log = skpo.update(model, torch.optim.SGD(model.parameters(), lr=0), samples, config(w_up=0))
    assert log["tokens"] == sum(len(s.tokens) for s in samples[1:] if not s.upstream)
    assert np.isclose(log["ratio"] / log["tokens"], 1, atol=1e-5) and not log["clip_fraction"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log = skpo.update(model, optimizer, [replace(s, advantage=0.0) for s in samples], config())
    assert log["tokens"] == log["grad_norm"] == 0 and not optimizer.state
    with pytest.raises(skpo.UserError, match="not a finite number"):
        skpo.update(model, optimizer, [replace(s, advantage=math.inf) for s in samples], config())
    assert all(map(torch.equal, model.parameters(), tiny[0].parameters()))

def test_bfloat16_computes_and_float32_is_trained(tiny):
    model, c = copy.deepcopy(tiny[0]), config(dtype="bfloat16")
    skpo.shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0)
    skpo.each_shard(model, "unshard")
    _, cache = skpo.prefill(model, [[1, 2, 3]])
    log = skpo.update(model, optimizer, batch_of(model, tiny[1]), c)
    after = [p.full_tensor() for p in optimizer.param_groups[0]["params"]]
    moved = [(a != b).float().mean() for a, b in zip(after, tiny[0].parameters())]
    assert (cache.layers[0].keys.dtype, after[0].dtype) == (torch.bfloat16, torch.float32)
    assert np.mean(moved) > 0.9 and abs(log["ratio"] / log["tokens"] - 1) < 0.02

# ---- A training step, models
def one_step(warm, monkeypatch, step=1, seen=False, run=skpo.training_step, **kwargs):
    c = config(prompts_per_step=4, minibatches=2, **kwargs)
    problems = skpo.load_problems("sums")[:8]
    for p in problems:
        p.ids = skpo.prompt_ids(warm[1], p.question)
    state = skpo.State(Tracker(8, 0), Tracker(8, c.init_length), {}, step)
    if seen:  # each once, by a policy far away
        state.values.value, state.values.count = np.linspace(-0.5, 0.5, 8), np.ones(8)
        state.last = {i: Sample([1], [-99.0], False, p.ids) for i, p in enumerate(problems)}
    model = copy.deepcopy(warm[0])
    t, generate = SimpleNamespace(state=state, V=state.values.value.copy(), calls=[]), skpo.generate
    def spy(model, tokenizer, prompts, n, limits, temperature):
        groups = generate(model, tokenizer, prompts, n, limits, temperature)
        t.calls.append((prompts, n, list(limits), groups))
        return groups
    def rewards(groups):  # [B][n] lists of ids -> [B, n] of +-1
        right = [[skpo.is_correct(warm[1].decode(o, skip_special_tokens=True), problems[i].answer)
                  for o in group] for i, group in zip(t.chosen, groups)]
        return 2.0 * np.array(right) - 1
    with monkeypatch.context() as patch:
        patch.setattr(skpo, "generate", spy)
        patch.setattr(skpo, "update", update := MagicMock(side_effect=skpo.update))
        t.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        t.row = run(model, warm[1], t.optimizer, problems, state, c, **skpo.ablation(c, step))
    t.rewards, t.q, t.updates = rewards, t.calls[0][0], [x.args[2:] for x in update.mock_calls]
    t.chosen = [[p.ids for p in problems].index(q) for q in t.q]
    t.segments = [state.last[i].tokens for i in t.chosen if state.last]
    t.ups = [s for samples, _ in t.updates for s in samples if s.upstream]
    t.downs = [s for samples, _ in t.updates for s in samples if not s.upstream]
    return t

def standard(x):
    std = x.std(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.where(std, std, 1)

def test_a_training_step_does_what_the_paper_says(warm, monkeypatch):
    t = one_step(warm, monkeypatch, seen=True, weight_decay=0.3)
    (q, n1, stops, drawn), (x, n2, limits, responses) = t.calls
    assert n1 == n2 == 8 and limits == [24] * 4 and len(set(t.chosen)) == 4
    assert 2 <= min(stops) <= max(stops) <= 5 and [len(x) for x, _ in t.updates] == [18, 18]
    tokens = [[o.tokens for o in group] for group in responses]
    lengths = np.array([[len(o) for o in group] for group in tokens])
    R = t.rewards(tokens)
    surprise = R.mean(1) - t.V[t.chosen]  # V from before the step
    for b, i in enumerate(t.chosen):
        cut = [skpo.cut_segment(s) for s in drawn[b]]
        kept = cut[skpo.select_segment([s.logprobs for s in cut])].tokens
        assert t.segments[b] == kept and x[b] == kept + q[b]
        assert np.isclose(t.state.values.value[i], t.V[i] + surprise[b] / 1.875)  # pi moved far
        assert np.isclose(t.state.lengths.value[i], lengths[b].mean())
    assert np.allclose([s.advantage for s in t.ups], standard(surprise))
    assert [(s.prompt, s.tokens) for s in t.ups] == list(zip(q, t.segments))
    assert np.allclose([s.weight * len(s.tokens) for s in t.ups], 1 / 2)
    pairs = [(p, o) for p, group in zip(x, tokens) for o in group]
    assert [(s.prompt, s.tokens) for s in t.downs] == pairs
    assert np.allclose([s.advantage for s in t.downs], standard(R).ravel())
    assert np.allclose([s.weight for s in t.downs], np.repeat(1 / (2 * lengths.sum(1)), 8))
    expected = dict(
        entropy=-np.mean([x for group in responses for o in group for x in o.logprobs]),
        reward=R.mean(), mc_value=R.mean(), accuracy=(R > 0).mean(), lr=3e-5,
        mc_noise=(R.var(1, ddof=1) / 8).mean() / surprise.var(), response_tokens=lengths.mean(),
        zero_advantage=np.mean(R.std(1) == 0), segment_tokens=np.mean([*map(len, t.segments)]),
        tokens=lengths.sum() + sum(len(s.tokens) for group in drawn for s in group))
    assert expected == pytest.approx({key: t.row[key] for key in expected})
    assert t.optimizer.param_groups[0]["weight_decay"] == 0.3

def test_no_skip_continues_the_segment(warm, monkeypatch):
    t = one_step(warm, monkeypatch, ablation="no_skip")
    _, (x, _, limits, responses) = t.calls
    assert list(zip(x, limits)) == [(q + s, 24 - len(s)) for q, s in zip(t.q, t.segments)]
    whole = [[s + o.tokens for o in group] for s, group in zip(t.segments, responses)]
    assert np.isclose(t.row["reward"], t.rewards(whole).mean())  # graded and measured with s
    lengths = [np.mean([len(o) for o in group]) for group in whole]
    assert np.allclose(t.state.lengths.value[t.chosen], lengths)

@pytest.mark.parametrize("init_length, paused", [(10, True), (60, False)])
def test_no_mc_values_a_segment_by_its_own_outcome(warm, monkeypatch, init_length, paused):
    t = one_step(warm, monkeypatch, ablation="no_mc", init_length=init_length)
    (_, _, _, drawn), (x, *_), (onward, n, _, own) = t.calls
    assert n == 1 and x == [s + q for q, s in zip(t.q, t.segments)]
    assert onward == [q + s for q, s in zip(t.q, t.segments) if paused]
    whole = [[s + o.tokens] for s, (o,) in zip(t.segments, own)] or [
        next([o.tokens] for o in group if skpo.cut_segment(o).tokens == s)
        for s, group in zip(t.segments, drawn)]
    values = t.rewards(whole)[:, 0]
    assert np.allclose([s.advantage for s in t.ups], standard(values))
    assert np.allclose(t.state.values.value[t.chosen], values)

@pytest.mark.parametrize("step, end, pick", [(1, 1 / 2, np.argmax), (2, 1 / 6, np.argmin)])
def test_fixed_split_and_extreme_selection_alternate(warm, monkeypatch, step, end, pick):
    t = one_step(warm, monkeypatch, step, ablation="fixed_split", init_length=12)
    assert t.calls[0][2] == [12 * end] * 4
    t = one_step(warm, monkeypatch, step, ablation="extreme_selection")
    for segment, group in zip(t.segments, t.calls[0][3]):
        cut = [skpo.cut_segment(s) for s in group]
        assert segment == cut[pick([-np.mean(s.logprobs) for s in cut])].tokens

def test_grpo_is_ppo_on_responses_from_the_prompt(warm, monkeypatch):
    t = one_step(warm, monkeypatch, run=skpo.grpo_step, algo="grpo", w_up=0.3)
    (q, n, limits, responses), = t.calls
    R = t.rewards([[o.tokens for o in group] for group in responses])
    assert n == 8 and limits == [24] * 4 and len(t.ups) == 32 and not t.downs  # eq. 6's form
    assert [s.prompt for s in t.ups] == [p for p in q for _ in range(8)]
    assert np.allclose([s.advantage for s in t.ups], standard(R).ravel())
    assert np.allclose([s.weight * len(s.tokens) for s in t.ups], 1 / 16)  # 2 prompts of 8
    assert [(c.w_up, c.clip_low) for _, c in t.updates] == [(1.0, 0.2)] * 2
    assert np.allclose(t.state.values.value[t.chosen], R.mean(1))

@pytest.mark.parametrize("name, right, settings", [
    ("Qwen2", True, {}), ("Llama", True, {}), ("GPT2", True, dict(n_embd=32, n_layer=2, n_head=2)),
    ("Gemma2", True, dict(final_logit_softcapping=None)),
    ("Gemma2", False, dict(final_logit_softcapping=2.)), ("Granite", False, dict(logits_scaling=3)),
    ("Lfm2", False, dict(layer_types=["conv", "full_attention"])),
    ("FalconH1", False, dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8))])
def test_models_whose_policy_would_be_wrong_are_refused(name, right, settings, monkeypatch):
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                 head_dim=16, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    settings = getattr(transformers, name + "Config")(**{**sizes, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    monkeypatch.setattr(skpo, "AutoTokenizer", MagicMock())
    monkeypatch.setattr(skpo.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    with contextlib.nullcontext() if right else pytest.raises(skpo.UserError, match="cannot use"):
        skpo.load_model(Config(model="x"))

def test_broken_weights_and_pickles_are_refused(warm, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model, _ = skpo.load_model(Config(model=str(tmp_path)))
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(skpo.UserError, match="log-probs"):
        skpo.load_model(Config(model=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    torch.save(warm[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(skpo.UserError, match="cannot use"):
        skpo.load_model(Config(model=str(tmp_path)))

# ---- Evaluation and runs
def test_evaluation_counts(tiny, monkeypatch):
    texts = [[rf"\boxed{{{x}}}" for x in row.split(",")] for row in ("1,3,1.0,", "2,5,5,", ",,,")]
    problems = [Problem("", answer, [i]) for i, answer in enumerate("12x")]
    monkeypatch.setattr(skpo, "generate", lambda m, t, prompts, n, *_: [
        [Sample([p[0], i], [0, 0], True) for i in range(n)] for p in prompts])
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[ids[0]][ids[1]])
    result = skpo.evaluate(tiny[0], tokenizer, problems, config())
    assert result == dict(accuracy=3 / 12, pass_at_k=2 / 3, majority=1 / 3, samples=4, problems=3)

def accuracy(model):
    problems = skpo.load_data(config(), *model)[1]["held-out"]
    return skpo.evaluate(*model, problems, config())["accuracy"]

def test_the_default_run_learns(quick, tmp_path):
    out = skpo.train(config(steps=40, eval_every=40, out=str(tmp_path)))
    before, after = rows_of(out, "data")
    assert before["accuracy"] <= 0.45 and after["accuracy"] >= before["accuracy"] + 0.33
    assert all(math.isfinite(x) for row in rows_of(out, "reward") for x in row.values())
    lr = [row["lr"] for row in rows_of(out, "reward")]
    assert np.allclose(lr, [3e-5 * min(step, 10) for step in range(1, 41)])
    assert accuracy(skpo.load_model(Config(model=str(out / "model")))) == after["accuracy"]

def test_the_warm_up_has_margin(warm):
    assert abs(accuracy(skpo.embedded_model(1, steps=300)) - accuracy(warm)) < 0.08
def short(out, **kwargs):  # the plan of a small run
    plan = dict(steps=4, prompts_per_step=8, eval_samples=1, eval_every=2, save_every=1)
    return {**skpo.EMBEDDED, **plan, "out": str(out), **kwargs}
def flags(out, folder, **kwargs):  # the same from a folder, as the embedded run would be
    paper = dict(model=folder, data="sums", minibatches=4, group_size=8, w_up=0.5, eval_problems=64)
    return [f"--{name}={value}" for name, value in short(out, **{**paper, **kwargs}).items()]

def test_the_same_seed_gives_the_same_numbers_and_evaluation_alone_no_model(quick, tmp_path):
    a, b, c = (rows_of(skpo.train(Config(**short(tmp_path / out, steps=2, seed=seed))), "step")
               for out, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert a == b != c
    out = skpo.train(Config(**short(tmp_path / "x", steps=0, eval_every=0)))  # evaluation alone
    assert [row["step"] for row in rows_of(out, "data")] == [0] and not (out / "model").exists()

def test_a_lower_accuracy_is_said_aloud(quick, tmp_path, capsys, monkeypatch):
    scores = [dict(accuracy=x, majority=0, pass_at_k=0, samples=1) for x in (0.5, 0.6, 0.4)]
    monkeypatch.setattr(skpo, "evaluate", MagicMock(side_effect=scores))
    skpo.train(Config(**short(tmp_path, save_every=0)))
    assert re.findall(r"accuracy (\S+).*--w_up 0", capsys.readouterr().out) == ["0.400"]

KILLED = """import os, sys
sys.path.insert(0, sys.argv.pop(1))
import skpo, torch
def kill_at(count, function):
    left = iter(range(count - 1, -1, -1))
    return lambda *a: function(*a) if next(left) else os.kill(os.getpid(), 9)
"""
def test_a_killed_run_goes_on_as_if_undisturbed(folder, tmp_path):
    skpo.main(flags(whole := tmp_path / "whole", folder))
    arguments = flags(killed := tmp_path / "killed", folder)
    for name, count in (("os.replace", 3), ("skpo.update", 6), ("skpo.tqdm.write", 2)):
        code = f"{KILLED}{name} = kill_at({count}, {name}); skpo.main()"
        command = [sys.executable, "-c", code, str(HERE), *arguments]
        assert subprocess.run(command, timeout=60).returncode == -9
        assert (killed / "checkpoint.tmp").exists() == (name == "os.replace")
        arguments = ["--resume", f"--out={killed}"]
    print('{"step": 99, "torn', end="", file=(killed / "metrics.jsonl").open("a"), flush=True)
    skpo.main(arguments)
    assert rows_of(killed, "step") == rows_of(whole, "step")

def test_a_full_disk_costs_no_older_checkpoint(quick, tmp_path, monkeypatch):
    skpo.train(Config(**short(tmp_path, steps=1, eval_every=0, dtype="bfloat16")))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert {*torch.load(tmp_path / "checkpoint.pt")[0]} == {*skpo.embedded_model(0)[0].state_dict()}
    for owner, name in (torch, "save"), (transformers.PreTrainedModel, "save_pretrained"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left"):
            patch.setattr(owner, name, MagicMock(side_effect=RuntimeError("No space left")))
            skpo.main(["--resume", f"--out={tmp_path}", "--steps=2"])
        assert (tmp_path / "checkpoint.pt").read_bytes() == before

# ---- The user's mistakes
@pytest.fixture
def files(tmp_path, folder):  # data files, right and wrong, folders that hold runs, and models
    good = '{"question": "1", "answer": "1"}\n'
    _ = [(tmp_path / name).mkdir() for name in ("run", "torn", "nomodel", "model", "narrow")]
    for path in folder.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
        text = path.read_bytes().replace(b'_embeddings": 32768', b'_embeddings": 64')
        (tmp_path / "narrow" / path.name).write_bytes(text)
    for name, text in {"good": good * 16, "few": good * 8, "broken": good + "{oops",
                       "run/metrics.jsonl": "precious", "torn/checkpoint.pt": "half of it"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path

@pytest.mark.parametrize("arguments, words", [
    ("--model @/none", "no such folder"), ("--resume --out=", "needs --out"),
    ("--model qwen2.5-none", "--model Qwen/qwen2.5-none"), ("--model @/nomodel", "cannot use"),
    ("--model @/narrow", "or --max_new"), ("--model x --data @/none", "no file"),
    ("--model x --eval_data @/good,@/none", "no file"), ("--group_sze 4", "--group_sze"),
    ("--out @/run", "is not empty"), ("--model @/model --data @/few", "--data: 7 problems"),
    ("--model @/model --data @/broken", "line 2: not a JSON"), ("--data @/good", "need a --model"),
    ("--group_size 1", "size >= 2"), ("--prompts_per_step 0", "step > 0"), ("--out @/good", "good"),
    ("--lr nan", "--lr nan: wanted"), ("--lr 0", "lr > 0"), ("--steps -1", "from 0 up"),
    ("--minibatches 3", "% mini"), ("--split_low 0.6", "split_high"), ("--split_high 2", "<= 1"),
    ("--lr fast", "invalid float"), ("--rho_min 0.99", "<= rho_max"), ("--clip_low 1", "low < 1"),
    ("--temperature 0", "steps == 0"), ("--algo grpo --ablation no_mc", "ablation == 'none'"),
    ("--algo ppo", "invalid choice"), ("--resume --out @/run", "no checkpoint"),
    ("--resume --out @/model", "no checkpoint"), ("--resume --out @/torn", "cannot resume"),
    ("--resume --out @/torn --steps 0", "steps")])
def test_a_mistake_gets_one_line(files, quick, capsys, arguments, words):
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    arguments = f"--out @/fresh {arguments}".replace("@", str(files))  # the last --out counts
    with pytest.raises(SystemExit) as stop:
        skpo.main(arguments.split())
    message = stop.value.code if stop.value.code != 2 else capsys.readouterr().err.strip()
    assert words in message and "\n" not in message and not (files / "fresh").exists()
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before

def test_a_run_is_not_resumed_with_other_data(files, folder):
    skpo.main(flags(out := files / "new", folder, steps=1, eval_every=0, data=files / "good"))
    before = rows_of(out, "step")
    with pytest.raises(SystemExit, match="it knows 14 problems, --data has 1792"):
        skpo.main(["--resume", f"--out={out}", "--data=arithmetic", "--steps=2"])
    assert rows_of(out, "step") == before

# ---- Several processes
def two_processes(tmp_path, code, *arguments):  # runs Python code on two processes
    script = tmp_path / "x.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport skpo\n{code}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)
def three_steps(tiny):  # logs, gradients and weights of steps of 3, 1 and 3 passes
    model, samples, c = *off_policy(tiny), config(micro_tokens=40)
    skpo.shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    kept = keep_gradients(optimizer)
    skpo.each_shard(model, "unshard")
    logs = [skpo.update(model, optimizer, part, c) for part in (samples, samples[1:3], samples)]
    weights = skpo.sharded.get_model_state_dict(model, options=skpo.WHOLE)
    return [torch.tensor([*log.values()]) for log in logs], *kept, [*weights.values()]

SAME_STEPS = """import torch, test_skpo
skpo.join_processes()
got = test_skpo.three_steps(skpo.embedded_model(0, steps=0))
if skpo.dist.get_rank() == 0:  # it alone holds the whole weights
    expected = torch.load(sys.argv[1])
    assert all(test_skpo.near(a, b, 1e-5) for x, y in zip(got, expected) for a, b in zip(x, y))
    print("THE STEPS ARE THE SAME", flush=True)
else:
    skpo.training_step = lambda *a, **k: 1 / 0
skpo.main(sys.argv[2:])
"""
def test_two_processes_take_the_steps_of_one_and_fail_together(tiny, folder, tmp_path):
    assert len(skpo.micro_batches(batch_of(*tiny)[1:], 40)) == 3  # 2 on one and 1 on the other
    torch.save(three_steps(tiny), tmp_path / "expected.pt")
    plan = flags(tmp_path / "run", folder, steps=500, eval_every=0)
    done = two_processes(tmp_path, SAME_STEPS, tmp_path / "expected.pt", *plan)
    assert "THE STEPS ARE THE SAME" in done.stdout, done.stderr[:2000]
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr

def test_two_processes_take_over_from_one_learn_and_hand_back(folder, tmp_path):
    out = tmp_path / "run"
    skpo.main(flags(out, folder, steps=1, prompts_per_step=32, eval_samples=4, eval_every=24))
    done = two_processes(tmp_path, "skpo.main()", "--resume", f"--out={out}", "--steps=24")
    assert done.returncode == 0, done.stderr[-2000:]
    skpo.main(["--resume", f"--out={out}", "--steps=25"])
    scores = [row["accuracy"] for row in rows_of(out, "data")]
    assert min(scores[2:]) > scores[0] + 0.2, scores
    assert [row["step"] for row in rows_of(out, "reward")] == list(range(1, 26))

# ---- The README's scripts
def test_the_readmes_scripts_say_what_it_says(quick, monkeypatch, capsys):
    text = (HERE / "README.md").read_text()
    scripts = re.findall(r"```python\n# \w+\.py\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["script", "--prompts_per_step=8"])
    for name in ("learn", "choose_prompts"):  # which scripts replace
        monkeypatch.setattr(skpo, name, getattr(skpo, name))
    signs, shortcut, polarity, noise = [exec(s, {}) or capsys.readouterr().out for s in scripts]
    for row in signs.splitlines()[1::5]:  # the README shows two; NumPy's streams differ by version
        shown = re.search(rf"\n{row[:7]}(.*)", text)[1].split()
        assert np.allclose(np.array(row.split()[1:], float), np.array(shown, float), atol=0.03)
    assert shortcut.count("continual") == shortcut.count("skip") == 6
    assert "upstream" in polarity and "nan" not in polarity + noise and noise.count("signal") == 2
