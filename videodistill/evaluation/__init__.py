"""How good are answers, and how good would they be without looking?"""
