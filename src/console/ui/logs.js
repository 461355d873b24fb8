// Manage > View Logs: the audit of all changes and logins, and the last lines of the Console's log.

import { get, list } from './api.js';
import { h, show } from './dom.js';
import { button, card, page, table, when } from './parts.js';

const ROWS = 50;
const LINES = 500;
const COLUMNS = [['When', 'time-column'], ['User'], ['From'], ['What'], ['Difference', 'wide-column']];

function difference(value) {
  if (value === null || value === undefined) return '';
  const fields = typeof value === 'string' ? value : Object.keys(value).length === 0 ? '' : JSON.stringify(value, null, 1);
  return fields && h('pre', { class: 'difference' }, fields);
}

function row(audit, at) {
  const failed = audit.ok === false || audit.success === false;
  return {
    key: `audit-${audit.id ?? at}`,
    kind: failed ? 'row-down' : null,
    cells: [
      when(audit.time),
      audit.user ?? audit.username ?? '',
      h('span', { class: 'mono' }, audit.source ?? audit.sourceIP ?? ''),
      [`${audit.action ?? audit.type ?? ''} ${audit.what ?? audit.api ?? ''}`, failed && h('strong', {}, ' failed')],
      difference(audit.difference ?? audit.diff),
    ],
  };
}

export function history(root) {
  const state = { rows: null, total: 0, offset: 0, problem: null };
  function draw() {
    const empty = state.problem ?? (state.rows ? 'Nothing yet.' : 'Loading …');
    const rows = state.rows ?? [];
    const last = state.offset + rows.length;
    const turn = (by) => () => load(Math.max(0, state.offset + by));
    const pager = h(
      'div',
      { class: 'buttons pager' },
      button('Newer', turn(-ROWS), { disabled: state.offset === 0 }),
      h('span', { class: 'quiet' }, rows.length > 0 ? `${state.offset + 1} to ${last}${state.total ? ` of ${state.total}` : ''}` : ''),
      button('Older', turn(ROWS), { disabled: state.total ? last >= state.total : rows.length < ROWS }),
      h('a', { class: 'button', href: '/api/v1/audits/mgmt?format=csv', download: true }, 'Download as CSV'),
    );
    show(
      root,
      page('History', 'Every change and every login, good or bad.', card('Audit', {}, table('Audit', COLUMNS, rows.map(row), empty), pager)),
    );
  }
  async function load(offset) {
    try {
      Object.assign(state, await list('/audits/mgmt', ROWS, offset), { offset, problem: null });
    } catch (error) {
      state.problem = error.message;
    }
    draw();
  }
  draw();
  load(0);
}

export function consoleLog(root) {
  let text = 'Loading …';
  function draw() {
    show(
      root,
      page(
        'Console log',
        `The last ${LINES} lines of the daemon on this host.`,
        h('div', { class: 'buttons' }, button('Look again', load)),
        h('pre', { class: 'log', tabindex: 0, 'aria-label': 'Console log' }, text),
      ),
    );
  }
  async function load() {
    try {
      const lines = await get(`/logs/console?lines=${LINES}`);
      text = Array.isArray(lines) ? lines.map((line) => line.log ?? line.text ?? line).join('\n') : String(lines?.lines?.join('\n') ?? lines);
    } catch (error) {
      text = error.message;
    }
    draw();
    const log = root.querySelector('.log');
    log.scrollTop = log.scrollHeight;
  }
  draw();
  load();
}
