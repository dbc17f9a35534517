"""Long clips: which frames are given, and what is kept between blocks."""
