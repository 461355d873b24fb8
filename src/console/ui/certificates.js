// Manage > Certificates: the names of the Console's certificate, and a certificate of your own.

import { get, post, remove } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, confirm, field, form, page, table, toast, when } from './parts.js';
import { nothing, span, time } from './words.js';

// Days before its end from which a certificate is shown as a problem.
const SOON = 14;
// Milliseconds between two checks for a new certificate, and how many there are.
const PACE = 300;
const TURNS = 10;
const COLUMNS = [['Certificate', 'word-column'], ['Subject', 'wide-column'], ['Issuer', 'user-column'], ['Expires', 'time-column'], ['Source', 'word-column']];

// When a certificate expires, and how long that is from now.
function expiry(end) {
  const left = end * 1000 - Date.now();
  const text = left > 0 ? `in ${span(left)}` : 'expired';
  return [when(end), h('div', { class: left < SOON * 86_400_000 ? 'problem' : 'quiet' }, text)];
}

function row(certificate, at) {
  const names = certificate.names ?? [];
  return {
    key: `certificate-${at}`,
    cells: [
      certificate.of,
      [
        h('strong', {}, certificate.subject),
        names.length > 0 && h('div', { class: 'quiet' }, names.join(', ')),
        certificate.missing?.length > 0 && h('div', { class: 'problem' }, `Not valid for: ${certificate.missing.join(', ')}`),
      ],
      certificate.issuer,
      expiry(certificate.not_after),
      certificate.source,
    ],
  };
}

export function open(root) {
  const state = { names: null, served: [], custom: null, problem: null };
  // Each member makes its own certificate: wait for that of this one.
  const served = async () => {
    const has = (name) => state.served.some(({ of, names }) => of === 'console' && names?.includes(name));
    for (let turn = 0; turn < TURNS; turn += 1) {
      await load();
      if (state.custom || state.names.every(has)) return;
      await new Promise((resolve) => { setTimeout(resolve, PACE); });
    }
  };
  const naming = () => form(
    'Save and reissue',
    async ({ names: text }, element) => {
      await post('/settings/certs', { consoleSAN: text.split(/[\s,]+/).filter(Boolean) });
      toast('The names are saved: every member serves a new certificate');
      await served();
      element.reset();
    },
    field('Host names and addresses, one per line', 'names', {
      element: 'textarea', rows: 6, spellcheck: 'false', class: 'mono', text: state.names.join('\n'),
    }),
  );
  const uploading = () => form(
    'Upload',
    async ({ certificate }, element) => {
      await post('/settings/custom-certs', { certificate });
      element.reset();
      toast('The certificate is served');
      await load();
    },
    field('Certificate chain and private key, PEM', 'certificate', {
      element: 'textarea', rows: 6, spellcheck: 'false', class: 'mono', required: true, autocomplete: 'off',
      hint: 'It must be valid for all members and for the load balancer. Nobody can read it back.',
    }),
  );
  const back = () => confirm(
    'Go back to the certificate of the cluster?',
    h('p', {}, 'Browsers that trust only your own authority will warn.'),
    'Go back',
    async () => {
      await remove('/settings/custom-certs');
      await load();
    },
    { kind: 'danger' },
  );
  function draw() {
    const custom = state.custom && [
      h('p', {}, `Uploaded for all Consoles by ${state.custom.by}, ${time(state.custom.at)}.`),
      button('Go back to the certificate of the cluster …', back),
    ];
    const empty = live.stale ? nothing(true) : state.problem ?? nothing(false, false);
    show(
      root,
      page(
        'Certificates',
        'Each member signs the certificate of its own Console, with the authority of the cluster.',
        card('In use', {}, table('Certificates', COLUMNS, state.served.map(row), empty)),
        h('div', { class: 'columns' },
          // Not before they are known: saving an empty list would take all names away.
          state.names && card('Names of the Console', {}, naming()),
          card('A certificate of your own', {}, custom, uploading())),
      ),
    );
  }
  async function load() {
    try {
      const found = await get('/settings/certs');
      state.served = found.certificates ?? [];
      state.custom = found.custom ?? null;
      state.names = found.consoleSAN ?? [];
      state.problem = 'Nothing is known about the certificates in use.';
    } catch (error) {
      state.problem = error.status === 404 ? 'This version has no settings for certificates.' : error.message;
    }
    draw();
  }
  draw();
  load();
  return { draw, load };
}
