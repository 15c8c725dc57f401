//! What an operator asks of the authority, and how `PUT /v1/connect/ca/configuration` says it.
//!
//! Keys come in Consul's spelling or in snake_case. What the built-in authority does not honour is refused by name, unless it
//! only repeats what is the case anyway.

use std::time::Duration;

use culvert_api::CaConfiguration;
use culvert_types::parse_go_duration;
use serde_json::Value;

use super::{CaSettings, ConfigureError};

/// What `PUT /v1/connect/ca/configuration` or a configuration file asks for; `None` keeps what is.
#[derive(Clone, Debug, Default)]
pub struct ConfigurationUpdate {
    /// `Provider`; empty or `consul`.
    pub provider: String,
    /// `Config.LeafCertTTL`.
    pub leaf_ttl: Option<Duration>,
    /// `Config.IntermediateCertTTL`.
    pub intermediate_ttl: Option<Duration>,
    /// `Config.RootCertTTL`: for the next root.
    pub root_ttl: Option<Duration>,
    /// `Config.CSRMaxPerSecond`.
    pub csr_max_per_second: Option<u32>,
    /// `Config.RotationPeriod`: kept, without effect, as in Consul.
    pub rotation_period: Option<String>,
    /// `Config.PrivateKey` was given and not empty. Refused.
    pub has_private_key: bool,
    /// `Config.RootCert` was given and not empty. Refused.
    pub has_root_cert: bool,
}

impl ConfigurationUpdate {
    /// `settings` with what is asked for.
    #[must_use]
    pub fn over(&self, settings: CaSettings) -> CaSettings {
        CaSettings {
            leaf_ttl: self.leaf_ttl.unwrap_or(settings.leaf_ttl),
            intermediate_ttl: self.intermediate_ttl.unwrap_or(settings.intermediate_ttl),
            root_ttl: self.root_ttl.unwrap_or(settings.root_ttl),
            csr_max_per_second: self.csr_max_per_second.unwrap_or(settings.csr_max_per_second),
            ..settings
        }
    }

    /// Refuses by name what the built-in authority cannot do.
    pub(crate) fn check(&self) -> Result<(), ConfigureError> {
        if !matches!(self.provider.as_str(), "" | "consul") {
            return Err(ConfigureError::Provider(self.provider.clone()));
        }
        if self.has_private_key {
            return Err(ConfigureError::Unsupported("PrivateKey"));
        }
        if self.has_root_cert {
            return Err(ConfigureError::Unsupported("RootCert"));
        }
        Ok(())
    }
}

impl TryFrom<&CaConfiguration> for ConfigurationUpdate {
    type Error = ConfigureError;

    fn try_from(body: &CaConfiguration) -> Result<Self, ConfigureError> {
        if body.state.as_ref().is_some_and(|state| !state.is_empty()) {
            return Err(ConfigureError::State);
        }
        let mut update = Self { provider: body.provider.clone(), ..Self::default() };
        for (key, value) in &body.config {
            update.take(key, value)?;
        }
        Ok(update)
    }
}

impl ConfigurationUpdate {
    fn take(&mut self, key: &str, value: &Value) -> Result<(), ConfigureError> {
        let plain = key.replace('_', "").to_ascii_lowercase();
        match plain.as_str() {
            "leafcertttl" => self.leaf_ttl = Some(duration(key, value)?),
            "intermediatecertttl" => self.intermediate_ttl = Some(duration(key, value)?),
            "rootcertttl" => self.root_ttl = Some(duration(key, value)?),
            "csrmaxpersecond" => self.csr_max_per_second = Some(whole(key, value)?),
            "rotationperiod" => {
                duration(key, value)?;
                self.rotation_period = Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned));
            }
            "privatekey" => self.has_private_key = !is_empty(value),
            "rootcert" => self.has_root_cert = !is_empty(value),
            "csrmaxconcurrent" => only(key, value, &[Value::from(0)])?,
            "privatekeytype" => only(key, value, &[Value::from("ec"), Value::from("")])?,
            "privatekeybits" => only(key, value, &[Value::from(256), Value::from(0)])?,
            "skipvalidate" => only(key, value, &[Value::from(false)])?,
            _ => return Err(ConfigureError::Unknown(key.to_owned())),
        }
        Ok(())
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_str() == Some("")
}

/// A Go duration, or nanoseconds.
fn duration(key: &str, value: &Value) -> Result<Duration, ConfigureError> {
    let wrong = |reason: String| ConfigureError::Value { key: key.to_owned(), reason };
    match value {
        Value::String(text) => parse_go_duration(text).map_err(|error| wrong(error.to_string())),
        Value::Number(number) => {
            number.as_u64().map(Duration::from_nanos).ok_or_else(|| wrong("not a number of nanoseconds".to_owned()))
        }
        _ => Err(wrong("not a duration such as \"72h\"".to_owned())),
    }
}

/// A whole number; Consul's clients send it as a float, too.
fn whole(key: &str, value: &Value) -> Result<u32, ConfigureError> {
    let number = value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(number));
    let wrong = || ConfigureError::Value { key: key.to_owned(), reason: "not a whole number from 0".to_owned() };
    number.map(|number| number as u32).ok_or_else(wrong)
}

fn only(key: &str, value: &Value, accepted: &[Value]) -> Result<(), ConfigureError> {
    if value.is_null() || accepted.contains(value) {
        return Ok(());
    }
    let reason = format!("the built-in authority knows only {}", accepted[0]);
    Err(ConfigureError::Value { key: key.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Value) -> Result<ConfigurationUpdate, ConfigureError> {
        let Value::Object(config) = config else { panic!("an object") };
        let body = CaConfiguration { provider: "consul".to_owned(), config, ..CaConfiguration::default() };
        ConfigurationUpdate::try_from(&body)
    }

    #[test]
    fn consuls_documented_body_is_read_in_both_spellings() {
        let documented = json!({"PrivateKey": "", "RootCert": "", "LeafCertTTL": "24h", "RotationPeriod": "2160h",
            "IntermediateCertTTL": "8760h", "RootCertTTL": "87600h", "CSRMaxPerSecond": 100.0, "PrivateKeyType": "ec", "PrivateKeyBits": 256});
        let snake = json!({"leaf_cert_ttl": "24h", "rotation_period": "2160h", "intermediate_cert_ttl": "8760h",
            "root_cert_ttl": "87600h", "csr_max_per_second": 100, "csr_max_concurrent": 0});
        for config in [documented, snake] {
            let update = read(config).expect("documented");
            assert_eq!(update.leaf_ttl, Some(Duration::from_secs(24 * 3600)));
            assert_eq!(update.root_ttl, Some(Duration::from_secs(87_600 * 3600)));
            assert_eq!(update.csr_max_per_second, Some(100));
            assert_eq!(update.rotation_period.as_deref(), Some("2160h"));
            assert!(!update.has_private_key && !update.has_root_cert);
        }
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name() {
        let refused = |config: Value| read(config).expect_err("refused").to_string();
        assert!(refused(json!({"Address": "http://vault"})).contains("\"Address\""));
        assert!(refused(json!({"PrivateKeyType": "rsa"})).contains("PrivateKeyType"));
        assert!(refused(json!({"CSRMaxConcurrent": 2})).contains("CSRMaxConcurrent"));
        assert!(refused(json!({"SkipValidate": true})).contains("SkipValidate"));
        assert!(refused(json!({"LeafCertTTL": "soon"})).contains("LeafCertTTL"));
        assert!(refused(json!({"LeafCertTTL": true})).contains("LeafCertTTL"));
        assert!(refused(json!({"CSRMaxPerSecond": -1})).contains("CSRMaxPerSecond"));
        let key = read(json!({"PrivateKey": "-----BEGIN", "RootCert": "-----BEGIN"})).expect("refused later, by name");
        assert!(key.has_private_key && key.has_root_cert);
        let state =
            CaConfiguration { state: Some([("k".to_owned(), json!("v"))].into_iter().collect()), ..Default::default() };
        assert!(matches!(ConfigurationUpdate::try_from(&state), Err(ConfigureError::State)));
    }
}
