"""The RL stage with a reward of the user's own."""

from tests.tiny import copy, record, refusal, start, values

STAGES = ("pretrain", "midtrain", "sft")


def test_a_stage_is_rewarded_by_a_function_of_the_users(finished, tmp_path, monkeypatch):
    run = copy(finished, tmp_path / "run", *STAGES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        'def f(question, answer, conversation):\n    assert " " not in answer, "a space"\n    return 3 + len(answer)'
    )
    code, out, err = start(run, "--stages=rl", "--rl.reward=mine:f")
    assert code == 0, err
    assert "answers are rewarded by mine:f" in out and "of 24 answers had no reward, and were left out" in out
    assert record(run, "rl")["steps"] == 3
    assert all(reward == 0 or reward >= 3 for _, reward in values(run, "rl", "reward"))
    assert all(reward >= 3 for _, reward in values(run, "rl", "reward_eval"))
    assert all(0 <= score <= 1 for _, score in values(run, "rl", "score_eval"))
    assert len(values(run, "rl", "score_eval")) == 3  # before the first step, and after the second and the last
    assert "rl.reward mine:f, not None" in refusal(start(run, "--stages=rl"))
    (tmp_path / "mine.py").write_text("f = 1")
    message = refusal(start(tmp_path / "new", "--rl.reward=mine:f"))
    assert message.startswith("rl.reward: f in mine.py is of class int, not a function")
    assert not (tmp_path / "new").exists()
