"""All that touches a framework, a disk, a data set or a terminal; it imports ``became_core``, never the reverse."""
