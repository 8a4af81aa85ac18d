"""Objectives: what the student is trained towards. Each is a file; `model.objective` names one.

They see the student and its teacher through `base.Models` only, and know no model family.
"""
