"""Evaluation through lm-eval (extra `eval`): the model, the tasks that dlx brings, and the field's run files.

Nothing heavy is imported here: the command line looks in before it knows that it will evaluate.
"""
