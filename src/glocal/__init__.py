from glocal.patterns import *
