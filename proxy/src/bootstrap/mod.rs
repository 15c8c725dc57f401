//! How a sidecar is started: Envoy's command line ([`Args`]) and the bootstrap file it names ([`Bootstrap`]).
//!
//! The file is what `consul connect envoy -bootstrap` prints, and nothing more of Envoy's bootstrap language: who we are,
//! where the control plane is, the token, the admin address. Both spellings of field names (`load_assignment`,
//! `loadAssignment`) are read, as protobuf's JSON has it. What would change behaviour and is not honoured is refused by name.

mod args;
mod file;
mod object;

pub use args::{Args, ArgsError, Command, HELP, Level};
pub use file::{Bootstrap, BootstrapError, ControlPlane, MAX_BOOTSTRAP};
