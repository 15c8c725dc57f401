//! The authority and the leaves as a whole: certificates parsed by x509-parser and verified by rustls-webpki, hostile
//! requests, rotation and renewal under a virtual clock.

mod certificates;
mod requests;
mod rotation;
mod world;
