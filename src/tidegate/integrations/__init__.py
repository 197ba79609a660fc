"""Tidegate inside other programs. Each module is loaded by the program that it is for, and by nothing else."""
