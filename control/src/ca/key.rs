//! Key pairs: EC P-256, made where they are used, wiped when dropped: the encoded form here, the parsed one by aws-lc, whose
//! allocator clears what it frees. What rcgen copies while it makes or reads a pair is not ours to wipe.

use std::fmt;

use aws_lc_rs::encoding::{AsDer, EcPrivateKeyRfc5915Der};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rcgen::{KeyPair, PublicKeyData};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use super::pem;

/// Why a key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The generator failed.
    #[error("make an EC P-256 key")]
    Generate(#[source] rcgen::Error),
    /// A stored key cannot be read. The text of the key is never part of the message.
    #[error("the stored private key cannot be read")]
    Read(#[source] rcgen::Error),
    /// The key is not on P-256.
    #[error("the private key is not an EC P-256 key")]
    Curve,
}

/// A private key with its public half. Prints as `PrivateKey(..)`.
pub(crate) struct PrivateKey(KeyPair);

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PrivateKey {
    /// Makes a new one.
    pub(crate) fn generate() -> Result<Self, KeyError> {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map(Self).map_err(KeyError::Generate)
    }

    /// Reads the PKCS #8 text that [`Self::to_pkcs8_pem`] wrote.
    pub(crate) fn from_pkcs8_pem(text: &str) -> Result<Self, KeyError> {
        let pair = KeyPair::from_pem(text).map_err(KeyError::Read)?;
        if pair.is_compatible(&rcgen::PKCS_ECDSA_P256_SHA256) { Ok(Self(pair)) } else { Err(KeyError::Curve) }
    }

    /// PKCS #8 text, for the state store.
    pub(crate) fn to_pkcs8_pem(&self) -> Zeroizing<String> {
        pem::encode(pem::PRIVATE_KEY, &Zeroizing::new(self.0.serialize_der()))
    }

    /// SEC 1 text (`EC PRIVATE KEY`), the form of the leaf endpoint and of Consul's TLS contexts.
    pub(crate) fn to_sec1_pem(&self) -> Result<Zeroizing<String>, KeyError> {
        let pkcs8 = Zeroizing::new(self.0.serialize_der());
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pkcs8).map_err(|_| KeyError::Curve)?;
        let sec1: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().map_err(|_| KeyError::Curve)?;
        Ok(pem::encode(pem::EC_PRIVATE_KEY, sec1.as_ref()))
    }

    /// The pair, for signing.
    pub(crate) fn pair(&self) -> &KeyPair {
        &self.0
    }

    /// Key identifier as Consul computes it: SHA-256 of the whole SubjectPublicKeyInfo, not truncated.
    pub(crate) fn identifier(&self) -> Vec<u8> {
        key_identifier(&self.0)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// See [`PrivateKey::identifier`]; for any public key.
pub(crate) fn key_identifier(key: &impl PublicKeyData) -> Vec<u8> {
    Sha256::digest(key.subject_public_key_info()).to_vec()
}
