"""nanochat's chat tasks, asked and graded as its `scripts/chat_eval.py` does, so that scores compare with its own.

What that takes goes with each task as its `mode` (`tasks.base.Mode`); `docs/evaluation.md` has the differences from
jaxchat's tasks. The names begin with `nanochat_`, since the two kinds of scores do not compare.
"""
