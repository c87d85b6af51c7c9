//! `xo-peerd certs`: a CA for the cluster and a certificate for each node.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertsError {
    /// A file cannot be read or written.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// A certificate is there already.
    #[error("{0} exists; --force replaces it")]
    Exists(String),
    /// The name or the CA's key is not usable.
    #[error("{0}: {1}")]
    Make(String, rcgen::Error),
}

/// Makes what is missing: `ca.pem` and `ca.key`, then `NODE.pem` and `NODE.key` for each node.
pub(crate) fn make(directory: &Path, nodes: &[String], force: bool) -> Result<(), CertsError> {
    fs::create_dir_all(directory).map_err(|e| CertsError::File(directory.display().to_string(), e))?;
    let issuer = authority(directory)?;
    for node in nodes {
        let (cert, key) = (directory.join(format!("{node}.pem")), directory.join(format!("{node}.key")));
        if !force && (cert.exists() || key.exists()) {
            return Err(CertsError::Exists(cert.display().to_string()));
        }
        let bad = |e| CertsError::Make(node.clone(), e);
        let mut params = CertificateParams::new(vec![node.clone()]).map_err(bad)?;
        params.distinguished_name.push(DnType::CommonName, node.as_str());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        valid(&mut params);
        let pair = KeyPair::generate().map_err(bad)?;
        let signed = params.signed_by(&pair, &issuer).map_err(bad)?;
        write(&key, &pair.serialize_pem(), 0o600)?;
        write(&cert, &signed.pem(), 0o644)?;
        println!("{} {}", cert.display(), key.display());
    }
    Ok(())
}

/// The CA in this directory, made if there is none. Its name is always the same, so its key suffices.
fn authority(directory: &Path) -> Result<Issuer<'static, KeyPair>, CertsError> {
    let (cert, key) = (directory.join("ca.pem"), directory.join("ca.key"));
    let bad = |e| CertsError::Make(key.display().to_string(), e);
    let mut params = CertificateParams::new(Vec::new()).map_err(bad)?;
    params.distinguished_name.push(DnType::CommonName, "XO cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params);
    match fs::read_to_string(&key) {
        Ok(pem) => Ok(Issuer::new(params, KeyPair::from_pem(&pem).map_err(bad)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let pair = KeyPair::generate().map_err(bad)?;
            let signed = params.self_signed(&pair).map_err(bad)?;
            write(&key, &pair.serialize_pem(), 0o600)?;
            write(&cert, &signed.pem(), 0o644)?;
            println!("{} {}", cert.display(), key.display());
            Ok(Issuer::new(params, pair))
        }
        Err(e) => Err(CertsError::File(key.display().to_string(), e)),
    }
}

/// Nodes' clocks may be wrong; the peers' authority is the CA, not the calendar.
fn valid(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2049, 12, 31);
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let file = |e| CertsError::File(path.display().to_string(), e);
    let mut out =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path).map_err(file)?;
    out.write_all(text.as_bytes()).map_err(file)
}
