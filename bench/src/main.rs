//! The bench: contenders take turns between the same two network namespaces.

mod load;

fn main() {}
