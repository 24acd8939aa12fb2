//! What the tests of this layer share.
