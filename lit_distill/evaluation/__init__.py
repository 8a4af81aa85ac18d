"""How close the student's samples are to the teacher's: metrics, their networks, contact sheets.

Every row counts once, with any number of processes.
Must not know how samples are generated, or by which model.
"""
