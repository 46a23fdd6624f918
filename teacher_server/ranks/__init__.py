"""Starts, watches and ends the processes that a divided teacher runs in, one for each device.

The replica is the first rank. The others are its children: they are given orders through a pipe, and
end when it closes, however the replica ended. So the same works with Ray and without: to Ray a
divided teacher is one actor that has several GPUs of one machine.
"""
