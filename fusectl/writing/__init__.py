"""Carrying out a Plan: reading, evaluating, writing, the journal that an interrupted run resumes from."""
