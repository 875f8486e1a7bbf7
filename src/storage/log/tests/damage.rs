//! Every byte cut, every byte flipped.
