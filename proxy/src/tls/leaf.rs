//! What webpki does not tell about a certificate: its URI names, all of them, its key usage, and when its life ends.
//!
//! A reader of just these, strict (DER, nothing trailing, every name looked at), so that "exactly one URI"
//! means exactly one and not "one that could be read". It decides nothing about the chain; it runs after webpki accepted
//! the certificate and must not panic on any input.

/// Why the extensions of a certificate could not be read.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum LeafError {
    /// Not the DER of an X.509 certificate.
    #[error("certificate is not well-formed DER")]
    Der,
    /// A URI name that is not ASCII (RFC 5280 §4.2.1.6: IA5String).
    #[error("URI name is not ASCII")]
    Uri,
}

/// What a certificate says about its holder.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Leaf<'a> {
    /// Every URI in the subject alternative name, in order.
    pub uris: Vec<&'a str>,
    /// End of its life, seconds since 1970; `None` if the time cannot be read. webpki checks validity; this is for status,
    /// and for how long what webpki said holds.
    pub not_after: Option<u64>,
    /// keyCertSign or cRLSign is among its key usages.
    pub may_sign_certificates: bool,
}

const SEQUENCE: u8 = 0x30;
const OID: u8 = 0x06;
const BOOLEAN: u8 = 0x01;
const OCTET_STRING: u8 = 0x04;
const BIT_STRING: u8 = 0x03;
/// `version [0] EXPLICIT` in TBSCertificate.
const VERSION: u8 = 0xa0;
/// Position of the validity in TBSCertificate, the version not counted.
const VALIDITY: usize = 3;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `extensions [3] EXPLICIT` in TBSCertificate (RFC 5280 §4.1).
const EXTENSIONS: u8 = 0xa3;
/// `uniformResourceIdentifier [6]` in GeneralName (RFC 5280 §4.2.1.6).
const URI: u8 = 0x86;
/// id-ce-subjectAltName, 2.5.29.17.
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
/// id-ce-keyUsage, 2.5.29.15.
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
/// Bits 5 (keyCertSign) and 6 (cRLSign) of the first byte, counted from the most significant (RFC 5280 §4.2.1.3).
const SIGNS_CERTIFICATES: u8 = 0b0000_0110;

impl<'a> Leaf<'a> {
    /// Reads the extensions of one certificate.
    ///
    /// # Errors
    /// [`LeafError`].
    pub fn read(certificate: &'a [u8]) -> Result<Self, LeafError> {
        let (mut outer, rest) = expect(certificate, SEQUENCE)?;
        if !rest.is_empty() {
            return Err(LeafError::Der);
        }
        let mut fields = expect_next(&mut outer, SEQUENCE)?;
        let mut leaf = Self::default();
        let mut position = 0; // of the fields behind the optional version: serial, algorithm, issuer, validity, …
        while !fields.is_empty() {
            let (tag, value, rest) = element(fields)?;
            fields = rest;
            if position == VALIDITY {
                leaf.not_after = not_after(value);
            }
            position += usize::from(tag != VERSION);
            if tag == EXTENSIONS {
                let mut value = value;
                let mut extensions = expect_next(&mut value, SEQUENCE)?;
                while !extensions.is_empty() {
                    let extension = expect_next(&mut extensions, SEQUENCE)?;
                    leaf.extension(extension)?;
                }
            }
        }
        Ok(leaf)
    }

    fn extension(&mut self, mut extension: &'a [u8]) -> Result<(), LeafError> {
        let oid = expect_next(&mut extension, OID)?;
        if extension.first() == Some(&BOOLEAN) {
            expect_next(&mut extension, BOOLEAN)?;
        }
        let (value, rest) = expect(extension, OCTET_STRING)?;
        if !rest.is_empty() {
            return Err(LeafError::Der);
        }
        match oid {
            SUBJECT_ALT_NAME => self.names(value),
            KEY_USAGE => self.usage(value),
            _ => Ok(()),
        }
    }

    fn names(&mut self, value: &'a [u8]) -> Result<(), LeafError> {
        let (mut names, rest) = expect(value, SEQUENCE)?;
        if !rest.is_empty() {
            return Err(LeafError::Der);
        }
        while !names.is_empty() {
            let (tag, name, rest) = element(names)?;
            names = rest;
            if tag == URI {
                let text = str::from_utf8(name).ok().filter(|text| text.is_ascii()).ok_or(LeafError::Uri)?;
                self.uris.push(text);
            }
        }
        Ok(())
    }

    fn usage(&mut self, value: &[u8]) -> Result<(), LeafError> {
        let (bits, rest) = expect(value, BIT_STRING)?;
        let [unused, bits @ ..] = bits else { return Err(LeafError::Der) };
        if !rest.is_empty() || *unused > 7 {
            return Err(LeafError::Der);
        }
        self.may_sign_certificates |= bits.first().is_some_and(|first| first & SIGNS_CERTIFICATES != 0);
        Ok(())
    }
}

/// The second of the two times of a validity (RFC 5280 §4.1.2.5): `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn not_after(validity: &[u8]) -> Option<u64> {
    let (_, _, second) = element(validity).ok()?;
    let (tag, text, _) = element(second).ok()?;
    let digits = text.strip_suffix(b"Z").filter(|digits| digits.iter().all(u8::is_ascii_digit))?;
    let number = |digits: &[u8]| digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => (number(&digits[..2]) + if digits[0] < b'5' { 2000 } else { 1900 }, &digits[2..]),
        (GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return None,
    };
    let [month, day, hour, minute, second] = [0, 2, 4, 6, 8].map(|at| number(&rest[at..at + 2]));
    // Days since 1970 of the proleptic Gregorian calendar, years counted from March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year.checked_sub(1)?, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day;
    Some(days.checked_sub(719_469)? * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// One element: its tag, its content, and what follows. Lengths must be definite and minimal (X.690 §10.1).
fn element(input: &[u8]) -> Result<(u8, &[u8], &[u8]), LeafError> {
    let [tag, length, rest @ ..] = input else { return Err(LeafError::Der) };
    if tag & 0x1f == 0x1f {
        return Err(LeafError::Der); // a tag of several bytes, which X.509 does not have
    }
    let (length, rest) = match (*length, rest) {
        (short @ 0..=0x7f, rest) => (usize::from(short), rest),
        (0x81, [one @ 0x80..=0xff, rest @ ..]) => (usize::from(*one), rest),
        (0x82, [one @ 1..=0xff, two, rest @ ..]) => (usize::from(u16::from_be_bytes([*one, *two])), rest),
        _ => return Err(LeafError::Der), // longer than 64 KiB, not minimal, or indefinite
    };
    let (value, rest) = rest.split_at_checked(length).ok_or(LeafError::Der)?;
    Ok((*tag, value, rest))
}

fn expect(input: &[u8], tag: u8) -> Result<(&[u8], &[u8]), LeafError> {
    let (found, value, rest) = element(input)?;
    if found == tag { Ok((value, rest)) } else { Err(LeafError::Der) }
}

fn expect_next<'a>(input: &mut &'a [u8], tag: u8) -> Result<&'a [u8], LeafError> {
    let (value, rest) = expect(input, tag)?;
    *input = rest;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, KeyUsagePurpose, SanType};

    fn certificate(uris: &[String], usages: Vec<KeyUsagePurpose>) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).expect("params");
        let names = uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().expect("ascii")));
        params.subject_alt_names.extend(names);
        params.key_usages = usages;
        params.self_signed(&KeyPair::generate().expect("key")).expect("sign").der().to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_uri_is_found_in_order(uris in proptest::collection::vec("spiffe://[a-z]{1,9}/[a-z/]{0,200}", 0..5)) {
            let der = certificate(&uris, vec![]);
            prop_assert_eq!(Leaf::read(&der).expect("well-formed").uris, uris);
        }

        #[test]
        fn truncation_and_flipped_bytes_never_panic(cut in 0usize..600, at in 0usize..600, flip in 1u8..) {
            let mut der = certificate(&["spiffe://td/a".to_owned()], vec![KeyUsagePurpose::CrlSign]);
            let at = at % der.len();
            der[at] ^= flip;
            let _outcome = Leaf::read(&der);
            der.truncate(cut);
            let _outcome = Leaf::read(&der);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _outcome = Leaf::read(&bytes);
        }
    }

    #[test]
    fn signing_usages_are_seen() {
        for (usages, signs) in [
            (vec![], false),
            (vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyAgreement], false),
            (vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign], true),
            (vec![KeyUsagePurpose::CrlSign], true),
        ] {
            assert_eq!(Leaf::read(&certificate(&[], usages)).expect("well-formed").may_sign_certificates, signs);
        }
    }

    #[test]
    fn the_end_of_life_is_read() {
        for (year, month, day, seconds) in
            [(2026, 11, 24, 1_795_478_400), (2049, 12, 31, 2_524_521_600), (2096, 2, 29, 3_981_312_000)]
        {
            let mut params = CertificateParams::new(vec![]).expect("params");
            params.not_after = rcgen::date_time_ymd(year, month, day);
            let certificate = params.self_signed(&KeyPair::generate().expect("key")).expect("sign");
            assert_eq!(Leaf::read(certificate.der()).expect("well-formed").not_after, Some(seconds), "{year}");
        }
    }

    #[test]
    fn lengths_must_be_minimal_and_definite() {
        for bad in [&[0x30, 0x80, 0, 0][..], &[0x30, 0x81, 1, 0], &[0x30, 0x82, 0, 1, 0], &[0x30, 2, 0], &[0x1f, 1, 0]]
        {
            assert_eq!(element(bad), Err(LeafError::Der), "{bad:02x?}");
        }
    }
}
